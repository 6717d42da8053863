"""One image as an array in the channels and the size that are asked for."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mdiff.errors import DataError

# An image (H, W, C), or (H, W) of one channel.
Pixels = NDArray[np.uint8]
# Pillow's modes that become these without a choice of what 16 bits or a float mean.
EIGHT_BIT = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
# A picture of more pixels is taken for a decompression bomb; seven bytes of memory are one pixel.
MAX_PIXELS = 3 * 2**24
ROWS_AT_ONCE = 256
# Of a picture's file.
MAX_FILE_BYTES = 2**27
MODES = {1: "L", 3: "RGB"}


def as_array(picture: object, *, channels: int, name: str = "the picture") -> Pixels:
    """A PIL image or an array as uint8 (H, W, channels); DataError for anything else."""
    if isinstance(picture, Image.Image):
        return _from_pil(picture, channels, name)
    array = picture.numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise DataError(
            f"{name}: an array {array.shape} {array.dtype}: expected uint8 (H, W) or (H, W, C)"
        )
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if array.ndim == 2:
        array = array[..., None]
    if array.shape[2] not in modes:
        raise DataError(f"{name}: {array.shape[2]} channels: expected 1, 3 or 4")
    if array.shape[2] == channels:
        return array
    plain = array[..., 0] if array.shape[2] == 1 else array
    return _from_pil(Image.fromarray(plain, modes[array.shape[2]]), channels, name)


def _from_pil(picture: Image.Image, channels: int, name: str) -> Pixels:
    if picture.mode not in EIGHT_BIT:
        raise DataError(f"{name}: pixels of mode {picture.mode}: expected 8 bits a channel")
    width, height = picture.size
    array = np.empty((height, width, channels), np.uint8)
    # A part at a time: a large picture is not to be held several times over.
    for top in range(0, height, ROWS_AT_ONCE):
        part = picture.crop((0, top, width, min(top + ROWS_AT_ONCE, height)))
        if part.mode in ("RGBA", "LA", "PA") or "transparency" in part.info:
            clear = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
        plain = np.asarray(part.convert(MODES[channels]))
        array[top : top + ROWS_AT_ONCE] = plain if plain.ndim == 3 else plain[..., None]
    return array


def open_picture(path: Path | str) -> Image.Image:
    """The picture in a file; DataError where it is missing, unreadable, cut short or huge."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} has {path.stat().st_size} bytes: more than {MAX_FILE_BYTES:,}")
    try:
        # Out of memory: what a file says of a length is taken in full from a disk before it is
        # found to be wrong. Opening reads the header alone, so that the size is known first.
        picture = Image.open(io.BytesIO(path.read_bytes()))
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise DataError(f"{path}: {width} x {height} pixels: more than {MAX_PIXELS:,}")
        picture.load()
        return picture
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a picture that can be read") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, SyntaxError, ValueError, zlib.error, struct.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def sized(array: Pixels, size: tuple[int, int], *, resize: bool, name: str) -> Pixels:
    """The array in the size, cut in the middle and scaled where that is allowed."""
    height, width = array.shape[:2]
    if (height, width) == tuple(size):
        return array
    if not resize:
        raise DataError(
            f"{name} has {height} x {width} pixels, expected {size[0]} x {size[1]}; "
            "resize: true would scale it"
        )
    share = min(height / size[0], width / size[1])
    crop = (round(size[0] * share), round(size[1] * share))
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    middle = array[top : top + crop[0], left : left + crop[1]]
    plain = middle[..., 0] if middle.shape[2] == 1 else middle
    scaled = np.array(Image.fromarray(plain).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    return scaled if scaled.ndim == 3 else scaled[..., None]
