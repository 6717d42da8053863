"""Options that several commands share, and how their values become arguments of the library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli.rules import OF_A_CALL
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


# For the commands with such a flag.
RENAMING = {"token_normalize_func": current_flag}

# The flags that say who makes the shards of a job.
DIVISION = ("workers", "timeout", "engine", "address", "shard")

Model = Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")]
SamplerName = Annotated[str, typer.Option("--sampler", help="A name from samplers/.")]
OwnSampler = Annotated[
    str | None,
    typer.Option("--sampler", help="A name from samplers/; default: the model's, first_hitting."),
]
NumSamples = Annotated[
    int, typer.Option("--num-samples", "--n", help="Samples for each prompt or picture.")
]
Steps = Annotated[int | None, typer.Option(help="Steps of the sampler, one model call each.")]
Temperature = Annotated[float | None, typer.Option(help="Of the draw; 0 takes the likeliest.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest of this total mass.")]
MinP = Annotated[
    float | None, typer.Option(help="Draw from those at least this share of the likeliest.")
]
Threshold = Annotated[
    float | None, typer.Option(help="Of confidence: tokens at least this likely are all revealed.")
]
Pairs = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="Any option of the sampler, k=v.")
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Scale of classifier-free guidance; 1 is none.")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(help="Replaces the prompt or condition in guidance's unconditional branch."),
]
GuidanceSchedule = Annotated[
    str | None, typer.Option(help="constant, linear or cosine: how the scale grows.")
]
GuidanceInterval = Annotated[
    str | None, typer.Option(help="LO,HI: guide only while this share of tokens is hidden.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
BatchSize = Annotated[int, typer.Option(help="Samples that go through the model together.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...")]
MaskId = Annotated[int | None, typer.Option(help="The mask's id, where no file names it.")]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A path or Hub id, for a checkpoint without a tokenizer."),
]
SpecialTokens = Annotated[
    str,
    typer.Option(help="Of the tokenizer: none, drawn (generated), typed (in prompts), or all."),
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds of silence after which a worker is killed; default: never."),
]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="local: processes here (default); ray: a cluster.")
]
Address = Annotated[
    str | None,
    typer.Option(help="Of a Ray cluster: HOST:PORT or auto; else RAY_ADDRESS, or one made here."),
]
ShardName = Annotated[
    str | None,
    typer.Option("--shard", help="K/N: make the K-th of N parts alone, as a job of an array."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a sample.")]
Trace = Annotated[
    Path | None,
    typer.Option(help="An HTML page that replays the reveals; of pictures also a .gif."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Pictures: one grid.png, or a folder of PNGs. Text of --input: a folder."),
]
ScaleUp = Annotated[
    int | None,
    typer.Option(help="Side in screen pixels of each pixel; default: as fits a grid, 1 of one."),
]

Resize = Annotated[bool, typer.Option("--resize", help="Crop and scale pictures of another size.")]


def loaded(
    model: str, device: str | None, dtype: str | None, mask_id: int | None,
    tokenizer: str | None, special_tokens: str,
) -> Pipeline:  # fmt: skip
    """The model that the flags name, with as many threads as it pays for."""
    from mdiff.pipeline import load

    pipeline = load(
        model, device=device, dtype=dtype, mask_id=mask_id, tokenizer=tokenizer,
        special_tokens=special_tokens,
    )  # fmt: skip
    fit_threads(pipeline.denoiser)
    return pipeline


def refuse(flags: Mapping[str, object], why: str, *names: str) -> None:
    """Raise ConfigError for the first of these flags that was given."""
    for name in names:
        if flags[name] is not None and flags[name] is not False:
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


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


def call_options(sampler: str | None, seed: int, batch_size: int) -> CallOptions:
    """The options of a call that every command has."""
    return {"sampler": sampler, "seed": seed, "batch_size": batch_size}


def check_sampler(options: CallOptions) -> None:
    """Raise ConfigError for an unknown sampler or for an option that it does not take."""
    from mdiff.sampling import bind

    own = {
        name: value
        for name, value in options.items()
        if name != "sampler" and not name.startswith("guidance_")
    }
    bind(options.get("sampler") or "first_hitting", own)


def guidance_options(
    scale: float | None, schedule: str | None, interval: str | None
) -> CallOptions:
    """The options of guidance that were given; an interval needs no schedule named.

    >>> guidance_options(2.0, None, "0.2,0.8")["guidance_interval"]
    (0.2, 0.8)
    """
    found: CallOptions = {} if scale is None else {"guidance_scale": scale}
    if schedule is not None:
        found["guidance_schedule"] = schedule
    if interval is not None:
        try:
            low, high = (float(end) for end in interval.split(","))
        except ValueError:
            raise ConfigError(
                f"--guidance-interval {interval[:40]!r}: expected LO,HI such as 0.2,0.8"
            ) from None
        found["guidance_interval"] = (low, high)
        found.setdefault("guidance_schedule", "interval")
    return found


def title_of(model: str, sampler: str | None) -> str:
    """The title of a page: the model, and the sampler where one was named."""
    return model if sampler is None else f"{model} · {sampler}"


def division(
    workers: int | None, timeout: float | None, engine: str | None, address: str | None,
    shard: str | None,
) -> Division:  # fmt: skip
    """Who makes the shards of a job, by its flags; ConfigError for invalid ones."""
    from mdiff.pipeline.batch import Division, Share

    return Division(workers, timeout, engine or "local", address, Share.of(shard))
