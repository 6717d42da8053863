"""Options that would have no effect, or none that makes sense: which, when, and what to do instead.

Every option of every command either always has an effect or has a rule here. The rules are
asked twice: by `Command` before anything is loaded, and by a command that has loaded its model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os.path import abspath
from pathlib import Path
from typing import Any

import typer

from mdiff.errors import ConfigError
from mdiff.find import names

PICTURES, TEXT = "pictures", "text"
# The names by which flags go that are not those of their parameters.
FLAGS = {"input_file": "input", "as_json": "json", "overrides": "set"}
# Options of a call, which no sampler has: -o would not set them.
OF_A_CALL = {
    "sampler": "--sampler", "seed": "--seed", "batch_size": "--batch-size", "end": "--end",
    "num_samples": "--num-samples", "n": "--num-samples", "prompts": "--prompt",
    "negative": "--negative-prompt", "generator": "--seed", "echo": "--chat",
    "grow": "--grow", "canvases": "--prompt", "conditions": "--label", "text": "mdiff revise",
    "given": "mdiff revise --keep", "keep": "--keep", "strength": "--strength",
    "rounds": "--rounds", "picture": "mdiff edit", "mask": "--mask", "self": "another name",
}  # fmt: skip
# A number above is a slip of the keyboard; a seed has 64 bits of any sign.
MOST = {"num_samples": 10**6, "batch_size": 10**6, "length": 10**7, "max_new_tokens": 10**7}
MOST_OF_ALL = 2**31 - 1
# Words that go through a model's own reader, which names a character that is none; and paths.
OTHERWISE_CHECKED = (
    "prompt", "infill", "chat", "negative_prompt", "system", "written", "model", "data", "name",
    "ids", "tokenizer",
)  # fmt: skip
OF_SAMPLES = frozenset({"frechet", "classifier", "diversity", "nearest"})


@dataclass(frozen=True)
class Asked:
    """The options of a command that were given, by parameter; `medium` once it is known.

    `model` is the model's name, and `medium` PICTURES or the name of another modality.
    """

    command: str
    given: Mapping[str, Any]
    model: str = ""
    medium: str = ""

    def has(self, *names: str) -> bool:
        """Whether one of them was given."""
        return any(name in self.given for name in names)

    def is_(self, name: str, value: object) -> bool:
        """Whether this option was given with this value."""
        return name in self.given and self.given[name] == value

    def sets(self, name: str) -> bool:
        """Whether an option of the sampler was given, by its flag or by -o."""
        words = self.given.get("option") or ()
        return self.has(name) or any(word.partition("=")[0].strip() == name for word in words)

    @property
    def pictures(self) -> bool:
        """Whether the model is known to be one of pictures."""
        return self.medium == PICTURES

    @property
    def other(self) -> bool:
        """Whether the model is known to be of another medium."""
        return bool(self.medium) and not self.pictures

    @property
    def volume(self) -> bool:
        """Whether a file of requests is generated into a folder."""
        return self.has("input_file") and self.has("out")

    @property
    def metrics(self) -> set[str]:
        """The metrics of eval."""
        return {name.strip() for name in str(self.given.get("metrics", "bound")).split(",")}

    def suffix(self, name: str) -> str:
        """The ending of a file's name; "" where none is given."""
        return Path(self.given.get(name) or "").suffix.lower()


@dataclass(frozen=True)
class Rule:
    """These options of these commands (words with spaces between) are refused `when`; `why` says
    what to do instead, with the model's name and medium and the option's value filled in.
    """

    commands: str
    options: str
    when: Callable[[Asked], bool]
    why: str


TEXT_ONLY = "is for models of text; {model} is one of pictures"
PICTURES_ONLY = "is for models of pictures; {model} is one of {medium}"
RULES = (
    Rule("generate", "workers timeout engine address shard", lambda a: not a.volume,
         "needs --input FILE and --out FOLDER, of a model of text"),
    Rule("generate", "tokenizer", lambda a: a.volume,
         "with --input and --out: put its files beside the weights"),
    Rule("generate revise", "stream", lambda a: a.has("as_json"),
         "does not go with --json, which is read by a program: leave one out"),
    Rule("generate", "stream", lambda a: a.has("input_file"),
         "does not go with --input, which may hold many requests: give --prompt"),
    Rule("generate edit revise", "negative_prompt guidance_schedule",
         lambda a: not a.sets("guidance_scale"), "needs a guidance_scale: give --guidance-scale"),
    Rule("generate edit revise", "negative_prompt guidance_schedule guidance_interval",
         lambda a: a.is_("guidance_scale", 1),
         "has no effect at --guidance-scale 1, which is no guidance"),
    Rule("generate edit revise", "top_k top_p min_p",
         lambda a: a.is_("temperature", 0) and not a.sets("measure"),
         "has no effect at --temperature 0, which takes the likeliest token"),
    Rule("generate", "resize", lambda a: not a.has("image", "input_file"),
         "is for pictures that are given: by --image or --input"),
    Rule("generate edit", "trace", lambda a: a.suffix("trace") not in (".gif", ".html", ".htm"),
         "{value}: expected a name that ends in .html or, for pictures, in .gif"),
    Rule("revise", "trace", lambda a: a.suffix("trace") not in (".html", ".htm"),
         "{value}: expected a name that ends in .html"),
    Rule("revise", "out", lambda a: a.given.get("num_samples", 1) > 1 and not a.has("as_json"),
         "holds one text: give it without --num-samples, or print all with --json"),
    Rule("generate edit revise", "trace",
         lambda a: a.has("out") and abspath(a.given["out"]) == abspath(a.given.get("trace", "")),
         "and --out are the same file: give them different names"),
    Rule("generate edit", "scale_up",
         lambda a: a.suffix("out") != ".png" and a.suffix("trace") != ".gif"
         and a.has("out", "image"),
         "enlarges a grid; the pictures of a folder keep their size: name a .png by --out"),
    Rule("demo", "out", lambda a: a.suffix("out") not in (".html", ".htm"),
         "{value}: expected a name that ends in .html"),
    Rule("generate", "infill chat length max_new_tokens stream grow", lambda a: a.pictures,
         TEXT_ONLY),
    Rule("generate", "grow", lambda a: a.volume, "does not go with --input and --out"),
    Rule("generate", "workers timeout engine address shard", lambda a: a.pictures, TEXT_ONLY),
    Rule("generate", "label image resize scale_up", lambda a: a.other, PICTURES_ONLY),
    Rule("generate", "trace", lambda a: a.other and a.volume, "does not go with --input and --out"),
    Rule("generate", "out", lambda a: a.other and not a.volume,
         "is for models of pictures; one of {medium} takes it with --input"),
    Rule("generate", "trace", lambda a: a.other and a.suffix("trace") == ".gif",
         "{value}: a GIF shows pictures; name a page such as trace.html"),
    Rule("eval", "captions classifier inception mask_ratio layer", lambda a: a.other,
         PICTURES_ONLY),
    Rule("eval", "subset hub_split",
         lambda a: not any(name.startswith("hub:") for name in a.given.get("data", ())),
         "is for data sets of the Hub: --data hub:NAME"),
    Rule("eval", "field separator", lambda a: a.pictures, TEXT_ONLY),
    Rule("eval", "window", lambda a: a.pictures, "is for models of text: a picture is one window"),
    Rule("eval", "sampler steps temperature option guidance_scale",
         lambda a: a.other and a.is_("samples", 0), "has no effect at --samples 0"),
    Rule("eval", "guidance_scale", lambda a: a.other,
         "has nothing to guide towards: samples of {medium} are drawn without a prompt"),
    Rule("eval", "holdout validation", lambda a: a.other and a.given.get("split", "all") == "all",
         "has no effect without --split train, validation or holdout ({name}={value})"),
    Rule("eval", "holdout validation",
         lambda a: a.pictures and a.is_("split", "all") and a.metrics <= {"bound", "order"},
         "has no effect with --split all"),
    Rule("eval", "samples sampler steps temperature option guidance_scale",
         lambda a: a.pictures and not a.metrics & OF_SAMPLES,
         f"needs a metric of samples: --metrics {', '.join(sorted(OF_SAMPLES))}"),
    Rule("eval", "classifier", lambda a: not a.metrics & {"frechet", "classifier"},
         "needs --metrics classifier or frechet"),
    Rule("eval", "inception", lambda a: "frechet" not in a.metrics, "needs --metrics frechet"),
    Rule("eval", "mask_ratio layer", lambda a: "probe" not in a.metrics, "needs --metrics probe"),
    Rule("eval", "orders order_rows", lambda a: "order" not in a.metrics, "needs --metrics order"),
    Rule("eval", "samples sampler steps temperature option draws",
         lambda a: a.other and "bound" not in a.metrics, "needs --metrics bound"),
    Rule("eval", "estimator", lambda a: "bound" not in a.metrics, "needs --metrics bound"),
    Rule("eval", "draws", lambda a: a.given.get("estimator", "time") not in ("any_order", "time"),
         "is for --estimator any_order and time; the others draw no share of hidden tokens"),
    Rule("sweep", "samples",
         lambda a: not any(word.strip().startswith("sample.") for word in a.given.get("grid", ())),
         "needs an option of sampling in the grid, such as --grid sample.temperature=0.7,1"),
    Rule("tokenizer-train", "vocab_size", lambda a: a.is_("kind", "char"),
         "is for --kind bpe: char has the characters that occur"),
    Rule("tokenizer-train", "vocab_size eos field", lambda a: a.pictures,
         "is for --kind char, bpe, not for {model}"),
    Rule("tokenizer-train", "size resize captions channels codebook_size stride steps option seed",
         lambda a: a.other, "is for --kind {codecs}, not for {model}"),
    Rule("tokenizer-encode tokenizer-decode tokenizer-inspect",
         "out size captions rows resize n workers timeout engine address shard",
         lambda a: a.other, "is for pictures, {model} is a tokenizer of text"),
    Rule("tokenizer-inspect", "size resize", lambda a: not a.has("data"), "needs --data"),
    Rule("convert", "from_pickle", lambda a: a.suffix("source") == ".safetensors",
         "is for pickles; {source} is none"),
)  # fmt: skip
# Options of which one can be given.
EXCLUSIVE = {
    "generate": (
        "prompt infill chat input_file", "infill length max_new_tokens", "label infill input_file",
        "image infill input_file",
    ),
    "revise": ("steps rounds",),
    "edit": ("mask mask_file keep",),
}  # fmt: skip


class Command(typer.core.TyperCommand):
    """A command whose options are checked before it runs; `ctx.obj` is what was `Asked`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, or raise ConfigError."""
        parents = [] if ctx.parent is None else ctx.parent.command_path.split()[1:]
        given = {
            name: value
            for name, value in ctx.params.items()
            if value is not None
            and (source := ctx.get_parameter_source(name)) is not None
            and source.name == "COMMANDLINE"
        }
        ctx.obj = Asked("-".join([*parents, ctx.info_name or ""]), given)
        for name, value in given.items():
            for each in value if isinstance(value, list | tuple) else (value,):
                check_value(name, each)
        refuse(ctx.obj)
        return super().invoke(ctx)


def refuse(asked: Asked, model: str = "", medium: str = "") -> None:
    """Raise ConfigError for the first option that a rule refuses, and for those that exclude
    each other; with the model's name and medium also by the rules on them, and for texts of
    pictures that are not UTF-8.
    """
    asked = replace(asked, model=model, medium=medium)
    for group in EXCLUSIVE.get(asked.command, ()):
        both = [flag(name) for name in group.split() if asked.has(name)]
        if len(both) > 1:
            raise ConfigError(f"{' and '.join(both)}: give one of them")
    for name in ("prompt", "negative_prompt") if asked.pictures else ():
        texts = asked.given.get(name, ())
        for text in (texts,) if isinstance(texts, str) else texts:
            check_unicode(name, text)
    for rule in RULES:
        if asked.command not in rule.commands.split():
            continue
        for name in filter(asked.sets, rule.options.split()):
            if rule.when(asked):
                why = rule.why.format(
                    model=model, medium=medium, name=name, value=asked.given.get(name),
                    source=asked.given.get("source"), codecs=", ".join(names("codecs")),
                )  # fmt: skip
                raise ConfigError(f"{flag(name)} {why}")


def check_value(name: str, value: object) -> None:
    """Raise ConfigError for a number or a text that no option of any command can mean."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value}: expected a finite number")
    if type(value) is int and name == "seed":
        if not -(2**63) <= value < 2**64:
            raise ConfigError(f"seed={value}: expected a 64-bit number")
    elif type(value) is int and abs(value) > (most := MOST.get(name, MOST_OF_ALL)):
        raise ConfigError(f"{flag(name)} {value}: expected at most {most:,}")
    if isinstance(value, str) and name not in OTHERWISE_CHECKED:
        check_unicode(name, value)


def check_unicode(name: str, value: str) -> None:
    """Raise ConfigError for a text of the command line whose bytes are not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{flag(name)}: character {error.start} is not valid Unicode: expected text in UTF-8"
        ) from None


def flag(name: str) -> str:
    """The flag of a parameter."""
    return "--" + FLAGS.get(name, name).replace("_", "-")
