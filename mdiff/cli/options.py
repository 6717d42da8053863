"""What generate and edit ask alike: the sampler with its options, guidance, and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mdiff.errors import ConfigError

Model = Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")]
SamplerName = Annotated[str, typer.Option("--sampler", help="A name from samplers/.")]
OwnSampler = Annotated[
    str | None,
    typer.Option("--sampler", help="A name from samplers/; else the model's, first_hitting."),
]
Steps = Annotated[int | None, typer.Option(help="Calls of the sampler.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest.")]
TopK = Annotated[int | None, typer.Option(help="Draw from the k likeliest.")]
TopP = Annotated[float | None, typer.Option(help="Draw from this mass.")]
MinP = Annotated[float | None, typer.Option(help="Leave out below this share.")]
Threshold = Annotated[
    float | None, typer.Option(help="Confidence also writes what is at least this sure.")
]
Pairs = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="Any option of the sampler, k=v.")
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Push away from the model without what is given.")
]
Negative = Annotated[
    str | None, typer.Option(help="Guide away from this in place of the prompt or chat.")
]
GuidanceSchedule = Annotated[
    str | None, typer.Option(help="constant, linear or cosine: how the scale sets in.")
]
GuidanceInterval = Annotated[
    str | None, typer.Option(help="LO,HI: guide only while this share is hidden.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same result.")]
BatchSize = Annotated[int, typer.Option(help="Samples at a time.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...")]
MaskId = Annotated[int | None, typer.Option(help="The mask's id, where the files do not say.")]
TokenizerName = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A path or Hub id, for a checkpoint without a tokenizer."),
]
Patience = Annotated[
    float | None,
    typer.Option(help="Seconds without a word after which a worker is killed; else never."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object a sample.")]
Trace = Annotated[
    Path | None,
    typer.Option(help="An HTML page to scrub through the reveals; of pictures also a .gif."),
]
Out = Annotated[
    Path | None,
    typer.Option(help="Pictures: one grid.png, or a folder of PNGs. Text of --input: a folder."),
]
ScaleUp = Annotated[
    int | None, typer.Option(help="Pixels of a grid become squares of this side; else it fits.")
]

Resize = Annotated[bool, typer.Option("--resize", help="Crop and scale pictures of another size.")]


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed of more than 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed={seed}: expected a 64-bit number")


def parsed_options(pairs: list[str]) -> dict[str, Any]:
    """Sampler options from "k=v" words; v is read as a YAML value."""
    from mdiff.files import parse_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"option {pair[:80]!r}: expected name=value")
        found[key.strip()] = parse_yaml(value.encode(), origin=f"option {pair[:80]!r}")
    return found


def guidance_options(
    scale: float | None, schedule: str | None, interval: str | None, negative: str | None = None
) -> dict[str, Any]:
    """The options of guidance that were given; an interval needs no schedule named.

    >>> guidance_options(2.0, None, "0.2,0.8")["guidance_interval"]
    (0.2, 0.8)
    """
    found: dict[str, Any] = {} if scale is None else {"guidance_scale": scale}
    if negative is not None:
        found["negative"] = negative
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
    """What a page is called: the model, and the sampler where one was named."""
    return model if sampler is None else f"{model} · {sampler}"
