"""Pictures to files: one grid, or a folder of one PNG each."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.cli.views.console import writable
from mdiff.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

# Pixels between the pictures of a grid, and around it.
GAP = 2
# A grid for people is enlarged while its longer side stays within so many pixels, and so often.
SIDE = 640
MOST_SCALE = 8


def picture_target(out: Path) -> Path:
    """The path; ConfigError where pictures cannot be written there.

    A name that ends in .png is a file; another is a folder that is empty or not there yet.
    """
    if out.suffix.lower() == ".png":
        writable(out)
    elif out.suffix and not out.is_dir():
        raise ConfigError(f"{out}: expected a name that ends in .png, or a folder")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} exists already: name a new folder, or a .png")
    return out


def write_pictures(
    pictures: Sequence[Image], out: Path, *, scale: int | None = 1, columns: int | None = None
) -> list[Path]:
    """Write one grid, row by row, to a .png, or each picture to a folder; return where each is.

    A grid's pixels become squares of `scale`; None is what `fitting_scale` says. One picture
    alone, which may be edited, and those of a folder keep their own size; a `scale` enlarges the
    one too.
    """
    if out.suffix.lower() == ".png":
        if len(pictures) == 1:
            enlarged(pictures[0], scale or 1).save(out)
            return [out]
        grid = grid_of(pictures, columns=columns)
        enlarged(grid, fitting_scale(grid) if scale is None else scale).save(out)
        return [out] * len(pictures)
    out.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(len(pictures) - 1)))
    paths = [out / f"{number:0{digits}}.png" for number in range(len(pictures))]
    for picture, path in zip(pictures, paths):
        picture.save(path)
    return paths


def fitting_scale(grid: Image, *, side: int = SIDE) -> int:
    """By how much a grid is enlarged for people: the most that keeps it within `side` pixels."""
    return max(1, min(MOST_SCALE, side // max(grid.size)))


def enlarged(picture: Image, scale: int) -> Image:
    """The picture with each pixel as a square of scale x scale."""
    if scale == 1:
        return picture
    from PIL import Image

    size = picture.width * scale, picture.height * scale
    return picture.resize(size, Image.Resampling.NEAREST)


def grid_of(pictures: Sequence[Image], *, columns: int | None = None) -> Image:
    """The pictures row by row on white, in the fewest columns that make it no taller than wide."""
    from PIL import Image

    width = max(picture.width for picture in pictures) + GAP
    height = max(picture.height for picture in pictures) + GAP
    columns = columns or next(n for n in count(1) if n * n >= len(pictures))
    rows = -(-len(pictures) // columns)
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    grid = Image.new(mode, (columns * width + GAP, rows * height + GAP), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        grid.paste(picture, (column * width + GAP, row * height + GAP))
    return grid
