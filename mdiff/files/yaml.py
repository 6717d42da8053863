"""YAML for recipes: plain values only, each key once, no aliases, numbers as people write them."""

import re
from typing import Any

import yaml

from mdiff.errors import ConfigError

MAX_DEPTH = 32


class SafeRecipeLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, aliases and deep nesting.

    1e-3 is a float (YAML 1.1 reads it as text), 1:30 is text (YAML 1.1 reads ninety), and a
    date stays text.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node; aliases are refused, as they could expand without bound."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not accepted", self.get_mark())
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                None, None, f"nested deeper than {MAX_DEPTH}", self.get_mark()
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a key is text, as it is written, and may occur once."""
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key in found:
                problem = (
                    f"the key {key[:80]!r} occurs twice"
                    if isinstance(key, str)
                    else "a key must be a word"
                )
                raise yaml.MarkedYAMLError(None, None, problem, key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found


# YAML's own rules without its dates and base-60 numbers, and with floats such as 1e-3.
_REPLACED = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float", "merge")}
SafeRecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INT = r"[-+]?(?:0|[1-9][0-9_]*)"
_FLOAT = (
    r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.inf|\.nan"
)
for _name, _pattern in (("int", _INT), ("float", _FLOAT)):
    SafeRecipeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list("-+.0123456789")
    )


def parse_yaml(text: bytes, *, origin: str) -> Any:
    """The plain value of `text`: dict, list, str, int, float, bool or None.

    Raises ConfigError, one line with `origin`, the line and the column.
    """
    try:
        return SafeRecipeLoader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{origin}: {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{origin}: not YAML: {first}") from None
