"""`mdiff generate`: fill in canvases, from prompts, templates or a file of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli.console import message, result, result_json, writable
from mdiff.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from mdiff.generation import Generated
    from mdiff.pipeline import Pipeline

INPUT_KEYS = ("prompt", "infill", "length")


def generate(
    model: Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from.")] = None,
    infill: Annotated[
        list[str] | None, typer.Option(help='Text with gaps: "The [MASK:8] of [MASK:3] night".')
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option("--input", help="JSONL: a prompt (and length) or an infill a line."),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Samples for each.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the canvas, prompt included.")
    ] = None,
    sampler: Annotated[str, typer.Option(help="A name from samplers/.")] = "first_hitting",
    steps: Annotated[int | None, typer.Option(help="Calls of the sampler.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out below this share.")] = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    order: Annotated[str | None, typer.Option(help="Order of the reveals.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="Any option of the sampler, k=v.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Push away from the model without the given tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same result.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Watch the canvas fill in.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write an HTML page to scrub through the reveals.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
) -> None:
    """Generate samples; the text goes to stdout, figures to stderr."""
    named = {
        "steps": steps, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "block_length": block_length, "order": order,
    }  # fmt: skip
    options = {key: value for key, value in named.items() if value is not None}
    options |= parsed_options(option or [])
    writable(trace)
    asked = requests(prompt, infill, input_file)
    if not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed={seed}: expected a 64-bit number")

    from mdiff.pipeline import load

    pipeline = load(model, device=device, dtype=dtype)
    canvases = [
        canvas
        for kind, text, own in asked
        for canvas in (
            pipeline.templates(text, n=n)
            if kind == "infill"
            else pipeline.canvases(text, length=own or length, n=n)
        )
    ]
    samples = fill_in(
        pipeline, canvases, live=stream, trace=trace, title=f"{model} · {sampler}",
        sampler=sampler, seed=seed, batch_size=batch_size, guidance_scale=guidance_scale,
        **options,
    )  # fmt: skip
    for number, sample in enumerate(samples):
        show(sample, as_json=as_json, first=number == 0)
    if trace is not None:
        message(f"wrote {trace}")


def fill_in(
    pipeline: Pipeline,
    canvases: list[list[int]],
    *,
    live: bool = False,
    trace: Path | None = None,
    title: str = "",
    **options: Any,
) -> list[Generated]:
    """Every canvas filled in, watched and recorded where asked for."""
    from mdiff.cli.live import watched
    from mdiff.trace import Recorder, page

    samples: list[Generated] = []
    records = []
    for run in pipeline.runs(canvases, **options):
        recorder = Recorder(run.canvas, run.valid, space=pipeline.space)
        for state in watched(run, pipeline.modality) if live else run:
            if trace is not None:
                recorder.add(state)
        done = run.finished()
        samples += done
        if trace is not None:
            records += recorder.records(pipeline.modality, [figures(sample) for sample in done])
    if trace is not None:
        trace.write_text(page(records, title=title), encoding="utf-8")
    return samples


def show(sample: Generated, *, as_json: bool, first: bool) -> None:
    """A sample: its text to stdout and its figures to stderr, or all of it as JSON."""
    if as_json:
        result_json(
            {
                "text": sample.output,
                "tokens": sample.tokens,
                "calls": sample.calls,
                "seconds": round(sample.seconds, 6),
                "log_prob": sample.log_prob,
                "entropy": sample.entropy,
                "seed": sample.seed,
            }
        )
        return
    if not first:
        result("---")
    result(str(sample.output))
    message(figures(sample))


def figures(sample: Generated) -> str:
    """One line on how a sample came about; nats are labelled."""
    return (
        f"{len(sample.tokens)} tokens, {sample.calls} calls, {sample.seconds:.2f} s, "
        f"entropy {sample.entropy:.3f} nats a draw, log-probability {sample.log_prob:.2f} nats, "
        f"seed {sample.seed}"
    )


def parsed_options(pairs: list[str]) -> dict[str, Any]:
    """Sampler options from "k=v" words; v is read as a YAML value."""
    from mdiff.safe_yaml import parse_yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"option {pair[:80]!r}: expected name=value")
        found[key.strip()] = parse_yaml(value.encode(), origin=f"option {pair[:80]!r}")
    return found


def requests(
    prompts: list[str] | None, infills: list[str] | None, path: Path | None
) -> list[tuple[str, str, int | None]]:
    """What to fill in, as (kind, text, own length); an empty prompt where nothing is asked."""
    kinds = [prompts is not None and "--prompt", infills is not None and "--infill"]
    given = [kind for kind in (*kinds, path is not None and "--input") if kind]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(map(str, given))}: give one of them")
    if path is not None:
        return _from_file(path)
    if infills is not None:
        return [("infill", text, None) for text in infills]
    return [("prompt", text, None) for text in prompts or [""]]


def _from_file(path: Path) -> list[tuple[str, str, int | None]]:
    from mdiff.sources import json_lines, read_text

    found: list[tuple[str, str, int | None]] = []
    for number, row in enumerate(json_lines(read_text(path), path), start=1):
        where = f"{path}, object {number}"
        for key in row:
            if key not in INPUT_KEYS:
                raise DataError(f"{where} has an unknown key {key!r}; {nearest(key, INPUT_KEYS)}")
        kinds = [kind for kind in ("prompt", "infill") if kind in row]
        if len(kinds) != 1 or not isinstance(row[kinds[0]], str):
            raise DataError(f"{where}: expected one of 'prompt' and 'infill', a string")
        length = row.get("length")
        if length is not None and (type(length) is not int or length < 1 or kinds[0] == "infill"):
            raise DataError(f"{where}: length={length!r}: expected a whole number, for a prompt")
        found.append((kinds[0], row[kinds[0]], length))
    if not found:
        raise DataError(f"{path} holds no object")
    return found
