"""`mdiff generate`: samples from prompts, templates or a file of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

import mdiff.cli.options as ask
from mdiff.cli.images.generate import Wanted, generate_pictures, medium_of, shows_pictures
from mdiff.cli.images.requests import combined, requests_of
from mdiff.cli.rules import refuse
from mdiff.cli.text import generate_at_volume, generate_text, requests_of_file, text_requests


@dataclass(frozen=True)
class Drawing(ask.Drawing):
    """How samples are drawn, also of text."""

    block_length: Annotated[int | None, "Tokens of a block."] = None
    order: Annotated[str | None, "Order of the reveals."] = None
    grow: Annotated[
        str | None, "Find the length of a text: blocks (of a block model) or daedal."
    ] = None
    end: Annotated[str, "End of text: cut there, keep what follows, or suppress it."] = "cut"


def generate(
    context: typer.Context,
    model: ask.Model,
    *,
    prompt: Annotated[list[str] | None, "Text to continue; of a picture, its caption."] = None,
    infill: Annotated[list[str] | None, 'Text with gaps: "The [MASK:8] of [MASK:3] night".'] = None,
    chat: Annotated[list[str] | None, "A user's message, for the model's chat template."] = None,
    label: Annotated[list[str] | None, "Label of a picture, of the model's names."] = None,
    image: Annotated[list[Path] | None, "A picture to describe: its label or caption."] = None,
    resize: ask.Resize = False,
    input_file: Annotated[
        Path | None,
        "JSONL: a prompt or chat (and length), an infill, or a label and image a line.",
    ] = None,
    num_samples: ask.NumSamples = 1,
    length: Annotated[int | None, "Tokens of the canvas, prompt included."] = None,
    max_new_tokens: Annotated[int | None, "Tokens after the prompt, instead of --length."] = None,
    out: ask.Out = None,
    scale_up: ask.ScaleUp = None,
    drawing: Drawing,
    loading: ask.Loading,
    stream: Annotated[bool, "Show the canvas as it fills."] = False,
    trace: ask.Trace = None,
    as_json: ask.AsJson = False,
    workers: Annotated[
        int | None, "Processes that generate for --input and a folder --out, of text."
    ] = None,
    dividing: ask.Dividing,
) -> None:
    """Generate samples: text to stdout, pictures to files; figures go to stderr."""
    # With a file of requests the folder may hold a part of the results: see docs/volume.md.
    volume = out is not None and input_file is not None
    options = drawing.options()
    if chat is not None and drawing.negative_prompt is not None:
        options["negative_prompt"] = {"chat": drawing.negative_prompt}
    title = ask.title_of(model, drawing.sampler)
    wanted = Wanted(None if volume else out, scale_up, trace, as_json, title)

    from mdiff.files import locate

    name, device, division = model, loading.device, None
    if volume:
        division = dividing.division(workers)
        # Where workers generate, this process only plans.
        device = device if division.in_process else "cpu"
        # A run that is being trained may get a newer checkpoint.
        name = str(locate(model).folder)
    pipeline = loading.load(name, device=device)
    refuse(context.obj, name, medium_of(pipeline))
    if shows_pictures(pipeline):
        asked = combined(label, prompt, image) if input_file is None else requests_of(input_file)
        generate_pictures(
            pipeline, asked, model=name, num_samples=num_samples, wanted=replace(wanted, out=out),
            resize=resize, options=options,
        )  # fmt: skip
    elif input_file is not None and out is not None:
        from mdiff.pipeline.batch import Setting

        rest = options.copy()
        del rest["seed"], rest["batch_size"]
        setting = Setting(
            seed=drawing.seed, num_samples=num_samples, length=length, options=rest,
            max_new_tokens=max_new_tokens, batch_size=drawing.batch_size,
        )  # fmt: skip
        generate_at_volume(
            pipeline, input_file, out, as_json=as_json, model=name, setting=setting,
            dtype=loading.dtype, device=loading.device, mask_id=loading.mask_id,
            special_tokens=loading.special_tokens, division=division,
        )  # fmt: skip
    else:
        requests = text_requests(prompt, infill, chat)
        generate_text(
            pipeline, requests if input_file is None else requests_of_file(input_file),
            num_samples=num_samples, length=length, max_new_tokens=max_new_tokens, live=stream,
            trace=trace, title=title, as_json=as_json, options=options,
        )  # fmt: skip
