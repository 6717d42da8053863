"""One image as an array in the channels and the size that are asked for; masks from files."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mdiff.errors import DataError

# An image (H, W, C), or (H, W) of one channel.
Pixels = NDArray[np.uint8]
# Found by a file's content, whatever its name says; none of them starts another program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")
ENDINGS = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp", ".dib",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs",
)  # fmt: skip
# Pillow's modes that become these without a choice of what a float or a layer means.
EIGHT_BIT = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
# Those with a clear part beside their colours; any other says it in its `info`.
CLEAR = ("RGBA", "LA", "PA", "RGBa", "La")
# A picture of more pixels is taken for a decompression bomb; seven bytes of memory are one pixel.
MAX_PIXELS = 3 * 2**24
ROWS_AT_ONCE = 256
# Of a picture's file.
MAX_FILE_BYTES = 2**27
MODES = {1: "L", 3: "RGB"}
MOST_OF_16_BITS = 2**16 - 1
# A mask is set where it is brighter. Strokes are black or white: of a picture with clear parts
# half of whose opaque pixels are between DARK and BRIGHT it is not known which part is meant.
HALF, DARK, BRIGHT = 127, 48, 207


def as_array(
    picture: object, *, channels: int, name: str = "the picture", ground: str = "white"
) -> Pixels:
    """A PIL image, a tensor or an array as uint8 (H, W, channels), clear parts on `ground`.

    Raises DataError for anything else, and for an image that cannot be decoded.
    """
    if isinstance(picture, Image.Image):
        return _from_pil(_loaded(picture, name), channels, name, ground)
    array = plain_array(picture, name)
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
        return array.astype(np.uint8, copy=False)
    plain = array[..., 0] if array.shape[2] == 1 else array
    return _from_pil(Image.fromarray(plain, modes[array.shape[2]]), channels, name, ground)


def plain_array(picture: object, name: str) -> NDArray[np.generic]:
    """What is no PIL image as an array; DataError for what is none."""
    try:
        found = picture.detach().cpu() if isinstance(picture, Tensor) else picture
        return np.asarray(found)
    except MemoryError:
        raise
    # Whatever a caller's object raises: lists of unequal length, tensors of numpy's no type.
    except Exception:
        kind = picture.dtype if isinstance(picture, Tensor) else type(picture).__name__
        raise DataError(f"{name}: {kind}: expected a picture or an array") from None


def _from_pil(picture: Image.Image, channels: int, name: str, ground: str) -> Pixels:
    if picture.mode.startswith("I;16"):
        return _from_16_bits(picture, channels, ground)
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode not in EIGHT_BIT:
        raise DataError(f"{name}: pixels of mode {picture.mode}: expected 8 or 16 bits a channel")
    width, height = picture.size
    array = np.empty((height, width, channels), np.uint8)
    # A part at a time: a large picture is not to be held several times over.
    for top in range(0, height, ROWS_AT_ONCE):
        part = picture.crop((0, top, width, min(top + ROWS_AT_ONCE, height)))
        if part.mode in CLEAR or "transparency" in part.info:
            clear = part.convert("RGBA")
            part = Image.alpha_composite(Image.new("RGBA", clear.size, ground), clear)
        plain = np.asarray(part.convert(MODES[channels]))
        array[top : top + ROWS_AT_ONCE] = plain if plain.ndim == 3 else plain[..., None]
    return array


def _from_16_bits(picture: Image.Image, channels: int, ground: str) -> Pixels:
    """Greys 0 to 65,535 as 0 to 255; Pillow would clip them."""
    deep = np.asarray(picture)
    grey = np.empty(deep.shape, np.uint8)
    for top in range(0, len(deep), ROWS_AT_ONCE):
        part = deep[top : top + ROWS_AT_ONCE].astype(np.uint32)
        grey[top : top + ROWS_AT_ONCE] = (part * 255 + MOST_OF_16_BITS // 2) // MOST_OF_16_BITS
    if isinstance(clear := picture.info.get("transparency"), int):
        grey[deep == clear] = 255 if ground == "white" else 0
    return grey[..., None].repeat(channels, 2)


def open_picture(path: Path | str) -> Image.Image:
    """The picture in a file, upright; DataError where it is missing, unreadable or huge.

    Of several pictures in it, the first. It is turned as the orientation in its EXIF data says.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{path} has {path.stat().st_size} bytes: more than {MAX_FILE_BYTES:,}")
        # In full: what a file says of a length is taken from a disk before it is found wrong.
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return decoded(content, str(path))


def decoded(content: bytes, name: str) -> Image.Image:
    """The picture in a file's content; see `open_picture`."""
    try:
        # This reads the header alone, so that the size is known before memory is taken.
        opened = Image.open(io.BytesIO(content), formats=_formats())
    except UnidentifiedImageError:
        raise DataError(
            f"{name} is not a picture that can be read: expected {', '.join(_formats())}"
        ) from None
    except Exception as error:
        raise _unreadable(name, error) from None
    picture: Image.Image = opened
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width} x {height} pixels: more than {MAX_PIXELS:,}")
    _loaded(picture, name)
    if picture.mode == "I" and opened.format in ("PNG", "PPM"):
        # 16 bits in 32: other files have no more in this mode.
        picture = picture.convert("I;16")
    return _upright(picture)


def _formats() -> tuple[str, ...]:
    """The formats that this Pillow has: before 11.3 it had no AVIF."""
    if not set(FORMATS) <= set(Image.OPEN):
        Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _loaded(picture: Image.Image, name: str) -> Image.Image:
    """The picture with its pixels decoded; DataError where they cannot be."""
    try:
        picture.load()
    except Exception as error:
        raise _unreadable(name, error) from None
    return picture


def _unreadable(name: str, error: Exception) -> Exception:
    """A DataError of whatever a decoder raises on a file, or the MemoryError itself."""
    if isinstance(error, MemoryError):
        return error
    return DataError(f"{name} cannot be read: {str(error) or type(error).__name__}")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except MemoryError:
        raise
    # Damage to what is beside the pixels is no damage to them.
    except Exception:
        return picture
    return picture


def open_mask(path: Path | str) -> NDArray[np.bool_]:
    """The pixels (H, W) bool of a mask in a file: true where it is white, clear parts are black.

    Raises DataError where that is none of them, and for a picture with clear parts that is
    neither black nor white elsewhere: a hole in it could mean either.
    """
    picture = open_picture(path)
    grey = as_array(picture, channels=1, name=str(path), ground="black")[..., 0]
    has_clear = picture.mode in CLEAR or "transparency" in picture.info
    if has_clear and picture.mode in EIGHT_BIT:
        colours = picture.convert("RGBA")
        opaque = np.asarray(colours.convert("L"))[np.asarray(colours.getchannel("A")) > HALF]
        if opaque.size and ((opaque > DARK) & (opaque < BRIGHT)).mean() > 1 / 2:
            raise DataError(
                f"{path}: a coloured picture with clear parts: expected a mask, white where to "
                "regenerate, and black or clear elsewhere"
            )
    mask = grey > HALF
    if not mask.any():
        clear = "; its clear parts are taken as black" if has_clear else ""
        raise DataError(
            f"{path}: the mask is empty, its brightest pixel is {int(grey.max())} of 255{clear}: "
            "expected white where to regenerate"
        )
    return mask


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
