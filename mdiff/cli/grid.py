"""Pictures to files: one grid, or a folder of one PNG each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.cli.console import writable
from mdiff.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

# Pixels between the pictures of a grid, and around it.
GAP = 2


def picture_target(out: Path) -> Path:
    """The path, after it was seen that pictures can go there; ConfigError where not.

    A name that ends in .png is a file; another is a folder that is empty or not there yet.
    """
    if out.suffix.lower() == ".png":
        writable(out)
    elif out.suffix:
        raise ConfigError(f"{out}: expected a name that ends in .png, or a folder")
    elif out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"{out} exists already: name a new folder, or a .png")
    return out


def write_pictures(pictures: Sequence[Image], out: Path) -> None:
    """Write one grid, row by row, to a .png; to a folder each picture at its own size."""
    if out.suffix.lower() == ".png":
        grid_of(pictures).save(out)
        return
    out.mkdir(parents=True, exist_ok=True)
    digits = max(3, len(str(len(pictures) - 1)))
    for number, picture in enumerate(pictures):
        picture.save(out / f"{number:0{digits}}.png")


def grid_of(pictures: Sequence[Image]) -> Image:
    """The pictures row by row on white, in the fewest rows that make it no taller than wide."""
    from PIL import Image

    width = max(picture.width for picture in pictures) + GAP
    height = max(picture.height for picture in pictures) + GAP
    columns = next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    rows = -(-len(pictures) // columns)
    mode = "L" if all(picture.mode == "L" for picture in pictures) else "RGB"
    grid = Image.new(mode, (columns * width + GAP, rows * height + GAP), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        grid.paste(picture, (column * width + GAP, row * height + GAP))
    return grid
