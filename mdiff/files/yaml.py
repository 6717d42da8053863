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
            raise yaml.composer.ComposerError(
                None, None, "aliases are not accepted", self.get_mark()
            )
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested deeper than {MAX_DEPTH}", self.get_mark()
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a key must be text and may occur once."""
        known: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word", key_node.start_mark
                )
            if key in known:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key[:80]!r} occurs twice", key_node.start_mark
                )
            known.add(key)
        return {
            key_node.value: self.construct_object(value_node, deep=True)
            for key_node, value_node in node.value
        }


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """YAML's own rules without its dates and base-60 numbers, and with floats such as 1e-3."""
    replaced = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "int", "float", "merge")}
    rules = {
        first: [(tag, pattern) for tag, pattern in pairs if tag not in replaced]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    numbers = (
        ("int", r"[-+]?(?:0|[1-9][0-9_]*)"),
        (
            "float",
            r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        ),
    )
    for name, pattern in numbers:
        for first in "-+.0123456789":
            rules.setdefault(first, []).append(
                (f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"))
            )
    return rules


SafeRecipeLoader.yaml_implicit_resolvers = _resolvers()


def parse_yaml(text: bytes, *, origin: str) -> Any:
    """The plain value of `text`: dict, list, str, int, float, bool or None.

    Raises ConfigError, one line with `origin`, the line and the column.
    """
    try:
        return yaml.load(text, Loader=SafeRecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{origin}: {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{origin}: not YAML: {first}") from None
