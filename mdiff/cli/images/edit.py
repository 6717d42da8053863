"""`mdiff edit`: pictures regenerated inside a mask, around what is kept, or as variations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mdiff.cli.options as ask
from mdiff.cli.images.generate import Wanted, fill_in, report, shows_pictures
from mdiff.cli.images.requests import (
    Request,
    given_parts,
    refuse_problems,
    refuse_unknown,
    with_pictures,
)
from mdiff.cli.rules import PICTURES, refuse
from mdiff.cli.views.console import message
from mdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from mdiff.cli.views.gif import Finish
    from mdiff.modalities.image import Edits, ImageModality
    from mdiff.pipeline import Generation

# A mask that was scaled is regenerated where it is brighter than this.
HALF = 127


def edit(
    context: typer.Context,
    model: ask.Model,
    pictures: Annotated[list[Path], typer.Argument(help="The files; each has its own variants.")],
    *,
    mask: Annotated[str | None, "ROWS,COLUMNS to regenerate, half-open: 8:24,8:24."] = None,
    mask_file: Annotated[
        Path | None, "A file of the same size, white where to regenerate; clear is black."
    ] = None,
    keep: Annotated[str | None, "ROWS,COLUMNS to keep; all around it is regenerated."] = None,
    strength: Annotated[float, "Share of the tokens to regenerate."] = 1.0,
    resize: ask.Resize = False,
    prompt: Annotated[str | None, "Its caption, where the model takes one."] = None,
    label: Annotated[str | None, "Its label, of the model's names."] = None,
    num_samples: ask.NumSamples = 1,
    out: ask.Out = None,
    scale_up: ask.ScaleUp = None,
    drawing: ask.Drawing,
    device: ask.Device,
    trace: ask.Trace = None,
    as_json: ask.AsJson = False,
) -> None:
    """Regenerate a part of pictures; not one pixel outside the mask changes."""
    from mdiff.kernels.philox import derive
    from mdiff.modalities.image import image_modality

    options = drawing.options()
    options["num_samples"] = num_samples
    wanted = Wanted(out, scale_up, trace, as_json, ask.title_of(model, drawing.sampler))

    pipeline = device.load(model)
    if not shows_pictures(pipeline):
        raise ConfigError(f"{model} is a model of {pipeline.modality.name}, not of pictures")
    modality = image_modality(pipeline.modality)
    refuse(context.obj, model, PICTURES)
    words = {"label": label, "caption": prompt}
    given = given_parts({name: word for name, word in words.items() if word is not None})
    refuse_unknown(modality, [given])
    region = region_of(
        mask, mask_file, keep, size=modality.size, pictures=pictures if resize else ()
    )
    files = [{"image": str(path)} for path in pictures]
    read, problems = with_pictures(modality, files, resize=resize)

    def runs() -> Iterator[tuple[Generation, Finish]]:
        for number, request in enumerate(read):
            options["seed"] = int(derive(drawing.seed, number)) if number else drawing.seed
            edits, batches = pipeline.edit_runs(
                request.given["image"], region, given=given, strength=strength, **options
            )
            if strength < 1 and number == 0:
                message(regenerated(modality, edits, strength))
            for run in batches:
                yield run, pasting(edits)

    wanted = wanted.of(len(read), num_samples)
    samples = fill_in(modality, runs(), wanted)
    first = read[0].source
    wanted = wanted.with_target(f"{first.stem if first else ''}-edited")
    requests = [Request(given, each.source) for each in read for _ in range(num_samples)]
    report(modality, samples, requests, wanted)
    refuse_problems(problems, len(read))


def regenerated(modality: ImageModality, edits: Edits, strength: float) -> str:
    """A line on what a strength below 1 changes."""
    hidden, of = edits.canvases[0].count(modality.space.mask_id), modality.length
    if not hidden:
        return f"strength {strength} regenerates 0 of {of} tokens: the picture stays as it was"
    rest = "" if modality.codec.lossless else "; the others are as its codec gives them back"
    return f"strength {strength} regenerates {hidden} of {of} tokens{rest}"


def pasting(edits: Edits) -> Finish:
    """Puts the original pixels back outside the mask."""
    return lambda row, picture: edits.pasted(picture)


def region_of(
    mask: str | None, mask_file: Path | None, keep: str | None, *, size: tuple[int, int],
    pictures: Sequence[Path] = (),
) -> Tensor | None:  # fmt: skip
    """The pixels (H, W) bool to regenerate, None for all of them.

    A file of the size of `pictures`, which are to be cropped and scaled, is so too. Raises
    ConfigError for an invalid box, DataError for one outside the picture, a mask of another size,
    and one that leaves nothing to regenerate.
    """
    from mdiff.modalities.image import box_mask, pixel_mask
    from mdiff.modalities.image.data import open_mask, open_picture, sized

    if mask is not None:
        return box_mask(mask, size)
    if keep is not None:
        return pixel_mask(~box_mask(keep, size), size)
    if mask_file is None:
        return None
    white = open_mask(mask_file)
    if white.shape == tuple(size):
        return pixel_mask(white, size)
    height, width = white.shape
    if not pictures:
        raise DataError(
            f"{mask_file} has {height} x {width} pixels, the pictures have {size[0]} x {size[1]}; "
            "--resize crops and scales a picture with its mask"
        )
    for path in pictures:
        try:
            opened = open_picture(path)
        except DataError:
            # Reported with the others that cannot be read.
            continue
        if opened.size != (width, height):
            raise DataError(
                f"{mask_file} has {height} x {width} pixels, {path} has {opened.height} x "
                f"{opened.width}: expected a mask of that size, or of {size[0]} x {size[1]}"
            )
    scaled = sized((white * 255).astype("uint8")[..., None], size, resize=True, name=str(mask_file))
    return pixel_mask(scaled[..., 0] > HALF, size)
