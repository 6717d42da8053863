"""`mdiff generate`: fill in canvases, from prompts, templates or a file of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli import options as ask
from mdiff.cli.images.requests import combined, requests_of
from mdiff.cli.offline import at_volume, device_of
from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from mdiff.pipeline import Generated, Pipeline

INPUT_KEYS = ("prompt", "infill", "chat", "length")


def generate(
    model: ask.Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on from; of a picture, what it shows.")
    ] = None,
    infill: Annotated[
        list[str] | None, typer.Option(help='Text with gaps: "The [MASK:8] of [MASK:3] night".')
    ] = None,
    chat: Annotated[
        list[str] | None, typer.Option(help="What you say, put by the model's chat template.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="What a picture shows, of the model's names.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to put into words.")] = None,
    resize: ask.Resize = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSONL: a prompt or chat (and length), an infill, or a label and image a line.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Samples for each.")] = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the canvas, prompt included.")
    ] = None,
    out: ask.Out = None,
    scale_up: ask.ScaleUp = None,
    sampler: ask.OwnSampler = None,
    steps: ask.Steps = None,
    temperature: ask.Temperature = None,
    top_k: ask.TopK = None,
    top_p: ask.TopP = None,
    min_p: ask.MinP = None,
    threshold: ask.Threshold = None,
    block_length: Annotated[int | None, typer.Option(help="Tokens of a block.")] = None,
    order: Annotated[str | None, typer.Option(help="Order of the reveals.")] = None,
    option: ask.Pairs = None,
    guidance_scale: ask.GuidanceScale = None,
    negative: ask.Negative = None,
    guidance_schedule: ask.GuidanceSchedule = None,
    guidance_interval: ask.GuidanceInterval = None,
    end: Annotated[
        str, typer.Option(help="End of text: cut there, keep what follows, or suppress it.")
    ] = "cut",
    seed: ask.Seed = 0,
    batch_size: ask.BatchSize = 32,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
    mask_id: ask.MaskId = None,
    tokenizer: ask.TokenizerName = None,
    stream: Annotated[bool, typer.Option("--stream", help="Watch the canvas fill in.")] = False,
    trace: ask.Trace = None,
    as_json: ask.AsJson = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that fill in --input for the folder --out, of text."),
    ] = None,
    patience: ask.Patience = None,
) -> None:
    """Generate samples: text to stdout, pictures to files; figures go to stderr."""
    from mdiff.cli.images import generate as shown

    named = {
        "steps": steps, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "threshold": threshold, "block_length": block_length, "order": order,
    }  # fmt: skip
    options: dict[str, Any]
    options = {key: value for key, value in named.items() if value is not None}
    options |= ask.parsed_options(option or [])
    options |= ask.guidance_options(guidance_scale, guidance_schedule, guidance_interval)
    options |= {"sampler": sampler, "seed": seed, "batch_size": batch_size, "end": end}
    ask.check_seed(seed)
    # With a file of requests the folder may hold a part of what is to be there: see cli/offline.
    volume = out is not None and input_file is not None
    if volume and tokenizer is not None:
        raise ConfigError("--tokenizer: with --input and --out, put its files beside the weights")
    target = None if volume else out
    wanted = shown.Wanted(target, scale_up, trace, as_json, ask.title_of(model, sampler))
    refuse_both({"--prompt": prompt, "--infill": infill, "--chat": chat, "--input": input_file})
    refuse_both({"--infill": infill, "--length": length})
    refuse_both({"--label": label or image, "--infill": infill, "--input": input_file})

    if not volume:
        of_volume = {"--workers": workers, "--patience": patience}
        refuse_given(of_volume, "needs --input FILE and --out FOLDER, of a model of text")
    apart = (workers or 1) > 1 or patience is not None
    place = device_of(device, plans_only=apart) if volume else device

    from mdiff.files import locate
    from mdiff.pipeline import load

    if volume:
        # Of a run that is still being trained the newest step may be another one a moment later.
        model = str(locate(model).folder)
    pipeline = load(model, device=place, dtype=dtype, mask_id=mask_id, tokenizer=tokenizer)
    if negative is not None:
        options["negative"] = negative if chat is None else {"chat": negative}
    if shown.shows_pictures(pipeline):
        refuse_given(
            {
                "--infill": infill,
                "--chat": chat,
                "--length": length,
                "--stream": stream or None,
                "--workers": workers,
                "--patience": patience,
            },
            f"is for models of text; {model} is one of pictures",
        )
        wanted = replace(wanted, out=out)
        asked = combined(label, prompt, image) if input_file is None else requests_of(input_file)
        shown.generate_pictures(
            pipeline, asked, model=model, n=n, wanted=wanted, resize=resize, **options
        )
        return
    refuse_given(
        {
            "--label": label,
            "--image": image,
            "--resize": resize or None,
            "--scale-up": scale_up,
        },
        f"is for models of pictures; {model} is one of {pipeline.modality.name}",
    )
    of_medium = f"one of {pipeline.modality.name} takes it with --input"
    refuse_given({"--out": target}, f"is for models of pictures; {of_medium}")
    if input_file is not None and out is not None:
        refuse_given(
            {"--stream": stream or None, "--trace": trace}, "does not go with --input and --out"
        )
        at_volume(
            pipeline, input_file, out, model=model, n=n, length=length, options=options,
            dtype=dtype, device=device, mask_id=mask_id, as_json=as_json,
            workers=1 if workers is None else workers, patience=patience,
        )  # fmt: skip
        return
    if wanted.is_film:
        raise ConfigError(f"--trace {trace}: a GIF shows pictures; name a page such as trace.html")
    wishes = requests(prompt, infill, chat, input_file)
    # Of a chat the answer is shown.
    options["echo"] = not all(kind == "chat" for kind, _, _ in wishes)
    canvases = [
        canvas
        for kind, words, own in wishes
        for canvas in (
            pipeline.templates(words, num_samples=n)
            if kind == "infill"
            else pipeline.canvases(
                {"chat": words} if kind == "chat" else words, length=own or length, num_samples=n
            )
        )
    ]
    samples = fill_in(
        pipeline, canvases, live=stream, trace=trace, title=wanted.title, **options
    )  # fmt: skip
    for number, sample in enumerate(samples):
        show(sample, as_json=as_json, first=number == 0)
    if trace is not None:
        message(f"wrote {trace}")


def refuse_given(options: dict[str, Any], why: str) -> None:
    """Raise ConfigError for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(f"{name} {why}")


def refuse_both(options: dict[str, Any]) -> None:
    """Raise ConfigError where more than one of the options was given."""
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")


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
    from mdiff.cli.views.live import watched
    from mdiff.cli.views.trace import Recorder, page

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


def requests(
    prompts: list[str] | None,
    infills: list[str] | None,
    chats: list[str] | None,
    path: Path | None,
) -> list[tuple[str, str, int | None]]:
    """What to fill in, as (kind, text, own length); an empty prompt where nothing is asked."""
    if path is not None:
        return _from_file(path)
    if infills is not None:
        return [("infill", text, None) for text in infills]
    if chats is not None:
        return [("chat", text, None) for text in chats]
    return [("prompt", text, None) for text in prompts or [""]]


def _from_file(path: Path) -> list[tuple[str, str, int | None]]:
    from mdiff.modalities.text import json_lines, read_text

    found: list[tuple[str, str, int | None]] = []
    for number, row in enumerate(json_lines(read_text(path), path), start=1):
        where = f"{path}, object {number}"
        for key in row:
            if key not in INPUT_KEYS:
                raise DataError(f"{where} has an unknown key {key!r}; {nearest(key, INPUT_KEYS)}")
        kinds = [kind for kind in ("prompt", "infill", "chat") if kind in row]
        if len(kinds) != 1 or not isinstance(row[kinds[0]], str):
            raise DataError(f"{where}: expected one of 'prompt', 'infill' and 'chat', a string")
        length = row.get("length")
        if length is not None and (type(length) is not int or length < 1 or kinds[0] == "infill"):
            raise DataError(f"{where}: length={length!r}: expected a whole number, for a prompt")
        found.append((kinds[0], row[kinds[0]], length))
    if not found:
        raise DataError(f"{path} holds no object")
    return found
