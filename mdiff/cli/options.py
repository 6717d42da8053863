"""Options that several commands share, and how a function becomes a command of its parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from mdiff.cli.rules import OF_A_CALL, Command, flag
from mdiff.cli.threads import fit_threads
from mdiff.cli.views.console import message
from mdiff.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from mdiff.pipeline import CallOptions, Pipeline
    from mdiff.pipeline.batch import Division

# Flags that were renamed: the old name goes on working, with a warning.
RENAMED = {
    "patience": "timeout",  # alias: --patience
    "negative": "negative-prompt",
}


def current_flag(name: str) -> str:
    """The name of a flag, without dashes, after a warning where it is an old one."""
    if name in RENAMED:
        message(f"warning: --{name} is now --{RENAMED[name]}")
    return RENAMED.get(name, name)


def add_command(line: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Add a function as a command, with its parameters as arguments and options.

    `Annotated[type, help, further names]` is an option, and a dataclass stands for its fields.
    """
    parameters, groups = [], {}
    for parameter, (kind, default) in _parameters(function).items():
        if isinstance(kind, type) and is_dataclass(kind):
            own = _parameters(kind)
            groups[parameter] = kind, list(own)
            parameters += [_for_typer(each, *own[each]) for each in own]
        else:
            parameters.append(_for_typer(parameter, kind, default))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for group, (kind, names) in groups.items():
            given[group] = kind(**{each: given.pop(each) for each in names})
        function(**given)

    command.__annotations__ = {each.name: each.annotation for each in parameters}
    vars(command)["__signature__"] = inspect.Signature(parameters)
    renamed = {flag(each.name)[2:] for each in parameters} & set(RENAMED.values())
    settings = {"token_normalize_func": current_flag} if renamed else {}
    line.command(name, cls=Command, context_settings=settings)(command)


def _parameters(of: Callable[..., object]) -> dict[str, tuple[Any, object]]:
    """The type and the default of each parameter of a function, or field of a dataclass."""
    hints = get_type_hints(of, include_extras=True)
    found = inspect.signature(of).parameters.values()
    return {each.name: (hints[each.name], each.default) for each in found}


def _for_typer(name: str, kind: Any, default: object) -> inspect.Parameter:
    first, *words = get_args(kind) or (None,)
    if words and isinstance(words[0], str):
        kind = Annotated[first, typer.Option(flag(name), *words[1:], help=words[0])]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)


Model = Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")]
NumSamples = Annotated[int, "Samples for each prompt or picture.", "--n"]
Trace = Annotated[Path | None, "An HTML page that replays the reveals; of pictures also a .gif."]
Out = Annotated[
    Path | None, "Pictures: one grid.png, or a folder of PNGs. Text of --input: a folder."
]
ScaleUp = Annotated[
    int | None, "Side in screen pixels of each pixel; default: as fits a grid, 1 of one."
]
Resize = Annotated[bool, "Crop and scale pictures of another size."]
Steps = Annotated[int | None, "Steps of the sampler, one model call each."]
Temperature = Annotated[float | None, "Of the draw; 0 takes the likeliest."]
Pairs = Annotated[list[str] | None, "Any option of the sampler, k=v.", "-o"]
GuidanceScale = Annotated[float | None, "Scale of classifier-free guidance; 1 is none."]
Seed = Annotated[int, "Same seed, same result."]
OneObject = Annotated[bool, "One JSON object."]
AsJson = Annotated[bool, "One JSON object a sample."]


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn."""

    sampler: Annotated[
        str | None, "A name from samplers/; default: the model's, first_hitting."
    ] = None
    steps: Steps = None
    temperature: Temperature = None
    top_k: Annotated[int | None, "Draw from the k likeliest tokens."] = None
    top_p: Annotated[float | None, "Draw from the likeliest of this total mass."] = None
    min_p: Annotated[float | None, "Draw from those at least this share of the likeliest."] = None
    # Options of some samplers; bind() refuses one that the sampler does not take.
    threshold: Annotated[
        float | None, "Of confidence, edit: tokens at least this likely are all revealed."
    ] = None
    edit_threshold: Annotated[
        float | None, "Of edit: a token is rewritten by one at least this likely."
    ] = None
    eta: Annotated[float | None, "Of remdm: how much of what is written is taken back."] = None
    nats: Annotated[float | None, "Of budget: the bound on the error of a sample."] = None
    drafts: Annotated[int | None, "Of speculative: tokens drafted for each round."] = None
    option: Pairs = None
    guidance_scale: GuidanceScale = None
    negative_prompt: Annotated[
        str | None, "Replaces the prompt or condition in guidance's unconditional branch."
    ] = None
    guidance_schedule: Annotated[str | None, "constant, linear or cosine: how the scale grows."] = (
        None
    )
    guidance_interval: Annotated[
        str | None, "LO,HI: guide only while this share of tokens is hidden."
    ] = None
    seed: Seed = 0
    batch_size: Annotated[int, "Samples that go through the model together."] = 32

    def options(self) -> CallOptions:
        """The options of a call; ConfigError for one that is given twice or is none."""
        rest = dict(vars(self))
        call: Any = {name: rest.pop(name) for name in ("sampler", "seed", "batch_size")}
        options = sampling_options(rest.pop("option"), **rest)
        if self.guidance_interval is not None:
            options["guidance_interval"] = guidance_interval(self.guidance_interval)
            # An interval needs no schedule named.
            options.setdefault("guidance_schedule", "interval")
        options |= call
        return options


@dataclass(frozen=True)
class Device:
    """Where a model runs, and in which type."""

    device: Annotated[str | None, "auto, cpu, cuda, ..."] = None
    dtype: Annotated[str | None, "float32, bfloat16, ..."] = None

    def load(self, model: str, **changed: Any) -> Pipeline:
        """The model of this name, with as many threads as it pays for."""
        from mdiff.pipeline import load

        pipeline = load(model, **{**vars(self), **changed})
        fit_threads(pipeline.denoiser)
        return pipeline


@dataclass(frozen=True)
class Loading(Device):
    """How a model is loaded, with what its files do not say."""

    mask_id: Annotated[int | None, "The mask's id, where no file names it."] = None
    tokenizer: Annotated[str | None, "A path or Hub id, for a checkpoint without a tokenizer."] = (
        None
    )
    special_tokens: Annotated[
        str, "Of the tokenizer: none, drawn (generated), typed (in prompts), or all."
    ] = "none"


@dataclass(frozen=True)
class Dividing:
    """Who makes the shards of a job, beside the number of workers."""

    timeout: Annotated[
        float | None, "Seconds of silence after which a worker is killed; default: never."
    ] = None
    engine: Annotated[str | None, "local: processes here (default); ray: a cluster."] = None
    address: Annotated[
        str | None, "Of a Ray cluster: HOST:PORT or auto; else RAY_ADDRESS, or one made here."
    ] = None
    shard: Annotated[str | None, "K/N: make the K-th of N parts alone, as a job of an array."] = (
        None
    )

    def division(self, workers: int | None) -> Division:
        """With so many workers; ConfigError for invalid flags."""
        from mdiff.pipeline.batch import Division, Share

        engine = self.engine or "local"
        return Division(workers, self.timeout, engine, self.address, Share.of(self.shard))


def input_rows(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a JSONL file of requests, each with its name for messages.

    Raises DataError for an unknown key and for a file without an object.
    """
    from mdiff.modalities.text import json_lines, read_text

    number, known = 0, sorted(keys)
    for number, row in enumerate(json_lines(read_text(path), path), start=1):
        where = f"{path}, object {number}"
        for key in row:
            if key not in known:
                raise DataError(f"{where} has an unknown key {key!r}; {nearest(key, known)}")
        yield where, row
    if not number:
        raise DataError(f"{path} holds no object")


def parsed_options(pairs: list[str] | None) -> dict[str, object]:
    """The options of "k=v" words; v is read as a YAML value."""
    from mdiff.files import parse_yaml

    found: dict[str, object] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"option {pair[:80]!r}: expected name=value")
        if key.strip() in found:
            raise ConfigError(f"option {key.strip()[:80]} is given twice")
        found[key.strip()] = parse_yaml(value.encode(), origin=f"option {pair[:80]!r}")
    return found


def sampling_options(pairs: list[str] | None, **flags: object) -> CallOptions:
    """The options of sampling that were given by flags, then those of "k=v" words."""
    # The sampler checks names and types, which are not known here.
    found: Any = {name: value for name, value in flags.items() if value is not None}
    pairs_given = parsed_options(pairs)
    for name in pairs_given:
        if name in OF_A_CALL:
            raise ConfigError(f"option {name}: no option of a sampler: use {OF_A_CALL[name]}")
        if name in found:
            raise ConfigError(f"option {name}: given by its flag too: give one of them")
    options: CallOptions = found | pairs_given
    return options


def guidance_interval(words: str) -> tuple[float, float]:
    """The shares of hidden tokens between which LO,HI guides.

    >>> guidance_interval("0.2,0.8")
    (0.2, 0.8)
    """
    try:
        low, high = map(float, words.split(","))
    except ValueError:
        raise ConfigError(
            f"--guidance-interval {words[:40]!r}: expected LO,HI such as 0.2,0.8"
        ) from None
    return low, high


def title_of(model: str, sampler: str | None) -> str:
    """The title of a page: the model, and the sampler where one was named."""
    return model if sampler is None else f"{model} · {sampler}"
