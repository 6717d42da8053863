"""`mdiff edit`: pictures made anew inside a mask, around what is kept, or as variations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli import options as ask
from mdiff.cli.images.requests import (
    Request,
    combined,
    read_picture,
    refuse_problems,
    refuse_unknown,
)
from mdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mdiff.cli.views.gif import Finish
    from mdiff.modalities.image import Edits
    from mdiff.pipeline import Generation

# A mask's file is made anew where it is brighter than this.
HALF = 127


def edit(
    model: ask.Model,
    pictures: Annotated[list[Path], typer.Argument(help="The files; each has n variants.")],
    mask: Annotated[
        str | None, typer.Option(help="ROWS,COLUMNS to make anew, half-open: 8:24,8:24.")
    ] = None,
    mask_file: Annotated[
        Path | None, typer.Option(help="A picture of the same size, white where to make anew.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="ROWS,COLUMNS to keep; all around it is made anew.")
    ] = None,
    strength: Annotated[float, typer.Option(help="Share of its tokens made anew.")] = 1.0,
    resize: ask.Resize = False,
    prompt: Annotated[str | None, typer.Option(help="What it shows, where told in words.")] = None,
    label: Annotated[str | None, typer.Option(help="What it shows, of the model's names.")] = None,
    n: Annotated[int, typer.Option("--n", help="Variants of each.")] = 1,
    out: ask.Out = None,
    scale_up: ask.ScaleUp = None,
    sampler: ask.OwnSampler = None,
    steps: ask.Steps = None,
    temperature: ask.Temperature = None,
    top_k: ask.TopK = None,
    top_p: ask.TopP = None,
    min_p: ask.MinP = None,
    option: ask.Pairs = None,
    guidance_scale: ask.GuidanceScale = None,
    negative: ask.Negative = None,
    guidance_schedule: ask.GuidanceSchedule = None,
    guidance_interval: ask.GuidanceInterval = None,
    seed: ask.Seed = 0,
    batch_size: ask.BatchSize = 32,
    device: ask.Device = None,
    dtype: ask.Dtype = None,
    trace: ask.Trace = None,
    as_json: ask.AsJson = False,
) -> None:
    """Make pictures anew in part; not one pixel outside the mask changes."""
    from mdiff.cli.images import generate as shown
    from mdiff.kernels.philox import derive
    from mdiff.modalities.image import image_modality
    from mdiff.pipeline import load

    named = {
        "steps": steps, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p
    }  # fmt: skip
    options = {key: value for key, value in named.items() if value is not None}
    options |= ask.parsed_options(option or [])
    options |= ask.guidance_options(guidance_scale, guidance_schedule, guidance_interval, negative)
    ask.check_seed(seed)
    regions = {"--mask": mask, "--mask-file": mask_file, "--keep": keep}
    given = [name for name, value in regions.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    wanted = shown.Wanted(out, scale_up, trace, as_json, ask.title_of(model, sampler))

    pipeline = load(model, device=device, dtype=dtype)
    if not shown.shows_pictures(pipeline):
        raise ConfigError(f"{model} is a model of {pipeline.modality.name}, not of pictures")
    modality = image_modality(pipeline.modality)
    (told,) = combined(
        None if label is None else [label], None if prompt is None else [prompt], None
    )
    refuse_unknown(modality, [told])
    region = region_of(mask, mask_file, keep, size=modality.size)
    read: list[tuple[Path, Any]] = []
    problems = []
    for path in pictures:
        try:
            read.append((path, read_picture(path, modality, resize=resize)))
        except DataError as error:
            problems.append(str(error))
    if not read:
        refuse_problems(problems, 0)

    def runs() -> Iterator[tuple[Generation, Finish]]:
        for number, (_, pixels) in enumerate(read):
            edits, batches = pipeline.edit_runs(
                pixels, region, given=told, strength=strength, n=n,
                seed=seed if number == 0 else int(derive(seed, number)), sampler=sampler,
                batch_size=batch_size, **options,
            )  # fmt: skip
            for run in batches:
                yield run, pasting(edits)

    wanted = wanted.of(len(read), n)
    samples = shown.fill_in(modality, runs(), wanted)
    wanted = shown.placed(wanted, f"{read[0][0].stem}-edited")
    requests = [Request(told, path) for path, _ in read for _ in range(n)]
    shown.report(modality, samples, requests, wanted)
    refuse_problems(problems, len(read))


def pasting(edits: Edits) -> Finish:
    """Puts the original pixels back outside the mask."""
    return lambda row, picture: edits.pasted(picture)


def region_of(
    mask: str | None, mask_file: Path | None, keep: str | None, *, size: tuple[int, int]
) -> Any:
    """The pixels (H, W) bool to make anew, None for all of them.

    Raises ConfigError for a box that is not one, DataError for one outside the picture, a mask
    of another size, and one that leaves nothing to make anew.
    """
    from mdiff.modalities.image import box_mask, pixel_mask
    from mdiff.modalities.image.data import as_array, open_picture

    if mask is not None:
        return box_mask(mask, size)
    if keep is not None:
        return pixel_mask(~box_mask(keep, size), size)
    if mask_file is None:
        return None
    pixels = as_array(open_picture(mask_file), channels=1, name=str(mask_file))[..., 0]
    if pixels.shape != tuple(size):
        raise DataError(
            f"{mask_file} has {pixels.shape[0]} x {pixels.shape[1]} pixels, the pictures have "
            f"{size[0]} x {size[1]}"
        )
    return pixel_mask(pixels > HALF, size)
