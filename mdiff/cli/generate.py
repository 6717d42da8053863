"""`mdiff generate`: samples from prompts, templates or a file of them."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import mdiff.cli.options as ask
from mdiff.cli.images.generate import Wanted, generate_pictures, medium_of, shows_pictures
from mdiff.cli.images.requests import combined, requests_of
from mdiff.cli.rules import refuse
from mdiff.cli.text import generate_at_volume, generate_text, requests_of_file, text_requests


def generate(
    context: typer.Context,
    model: ask.Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; of a picture, its caption.")
    ] = None,
    infill: Annotated[
        list[str] | None, typer.Option(help='Text with gaps: "The [MASK:8] of [MASK:3] night".')
    ] = None,
    chat: Annotated[
        list[str] | None, typer.Option(help="A user's message, for the model's chat template.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Label of a picture, of the model's names.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture to describe: its label or caption.")
    ] = None,
    resize: ask.Resize = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSONL: a prompt or chat (and length), an infill, or a label and image a line.",
        ),
    ] = None,
    num_samples: ask.NumSamples = 1,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the canvas, prompt included.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens after the prompt, instead of --length.")
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
    negative_prompt: ask.NegativePrompt = None,
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
    special_tokens: ask.SpecialTokens = "none",
    stream: Annotated[bool, typer.Option("--stream", help="Show the canvas as it fills.")] = False,
    trace: ask.Trace = None,
    as_json: ask.AsJson = False,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that generate for --input and a folder --out, of text."),
    ] = None,
    timeout: ask.Timeout = None,
    engine: ask.EngineName = None,
    address: ask.Address = None,
    shard: ask.ShardName = None,
) -> None:
    """Generate samples: text to stdout, pictures to files; figures go to stderr."""
    # With a file of requests the folder may hold a part of the results: see docs/volume.md.
    volume = out is not None and input_file is not None
    options = ask.sampling_options(
        option, steps=steps, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        threshold=threshold, block_length=block_length, order=order,
    )  # fmt: skip
    options |= ask.guidance_options(guidance_scale, guidance_schedule, guidance_interval)
    options |= ask.call_options(sampler, seed, batch_size)
    options["end"] = end
    if negative_prompt is not None:
        options["negative_prompt"] = negative_prompt if chat is None else {"chat": negative_prompt}
    wanted = Wanted(None if volume else out, scale_up, trace, as_json, ask.title_of(model, sampler))

    from mdiff.files import locate

    on, name, division = device, model, ask.division(workers, timeout, engine, address, shard)
    if volume:
        # Where workers generate, this process only plans.
        on = device if division.in_process else "cpu"
        # A run that is being trained may get a newer checkpoint.
        name = str(locate(model).folder)
    pipeline = ask.loaded(name, on, dtype, mask_id, tokenizer, special_tokens)
    refuse(context.obj, name, medium_of(pipeline))
    if shows_pictures(pipeline):
        asked = combined(label, prompt, image) if input_file is None else requests_of(input_file)
        generate_pictures(
            pipeline, asked, model=name, num_samples=num_samples, wanted=replace(wanted, out=out),
            resize=resize, options=options,
        )  # fmt: skip
        return
    if input_file is not None and out is not None:
        generate_at_volume(
            pipeline, input_file, out, model=name, num_samples=num_samples, length=length,
            max_new_tokens=max_new_tokens, seed=seed, batch_size=batch_size, options=options,
            dtype=dtype, device=device, mask_id=mask_id, division=division,
            as_json=as_json, special_tokens=special_tokens,
        )  # fmt: skip
        return
    requests = text_requests(prompt, infill, chat)
    generate_text(
        pipeline, requests if input_file is None else requests_of_file(input_file),
        num_samples=num_samples, length=length, max_new_tokens=max_new_tokens, live=stream,
        trace=trace, title=wanted.title, as_json=as_json, options=options,
    )  # fmt: skip
