"""Pictures one by one: out of folders, arrays, MNIST files, scikit-learn's digits, data sets."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mdiff.errors import BackendError, CheckpointError, DataError, nearest
from mdiff.files import inside
from mdiff.modalities.text.documents import HUB, check_growth, json_lines, pieces, read_text

if TYPE_CHECKING:
    from mdiff.modalities.image.data.images import PictureSource

# Pillow's modes that become these without a choice of what 16 bits or a float mean.
EIGHT_BIT = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
DIGITS = "sklearn.digits"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
METADATA = "metadata.jsonl"
# A picture of more pixels is taken for a decompression bomb; seven bytes of memory are one pixel.
MAX_PIXELS = 3 * 2**24
ROWS_AT_ONCE = 256
# Of a picture's file.
MAX_FILE_BYTES = 2**27
# The largest array that is read from a file.
MAX_BYTES = 2**34
MODES = {1: "L", 3: "RGB"}


@dataclass
class Item:
    """One picture as it was found; `array` uint8 (H, W[, C]), or a `path` to read."""

    name: str
    array: Any = None
    path: Path | None = None
    label: str | int | None = None
    caption: str | None = None


def check_words(item: Item) -> None:
    """DataError where a name, label or caption holds half a character, which no file can hold."""
    for kind, words in (("name", item.name), ("label", item.label), ("caption", item.caption)):
        try:
            str(words).encode()
        except UnicodeEncodeError:
            raise DataError(f"{item.name}: its {kind} is not text in UTF-8") from None


def as_array(picture: Any, *, channels: int, name: str = "the picture") -> Any:
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


def _from_pil(picture: Image.Image, channels: int, name: str) -> Any:
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


def sized(array: Any, size: tuple[int, int], *, resize: bool, name: str) -> Any:
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


def items_of(path: str, source: PictureSource) -> Iterator[Item]:
    if path == DIGITS:
        return _digits()
    if path.startswith(HUB):
        return _from_hub(path.removeprefix(HUB), source)
    place = Path(path)
    if place.is_dir():
        return _from_folder(place)
    if path.endswith(".npz"):
        return _from_arrays(place)
    if "-idx3-ubyte" in place.name:
        return _from_idx(place)
    return iter([Item(name=str(place), path=place)])


def _digits() -> Iterator[Item]:
    """The 1,797 digits of 8 x 8; their 17 greys 0 to 16 are 0 to 240."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (array, label) in enumerate(zip(found.images, found.target)):
        yield Item(name=f"{number}", array=(array * 15).astype(np.uint8), label=int(label))


def _from_folder(folder: Path) -> Iterator[Item]:
    listed = folder / METADATA
    if os.path.lexists(listed):
        if not listed.is_file():
            raise DataError(f"{listed} is not a plain file")
        for row in json_lines(read_text(listed), listed, "file_name"):
            label = row.get("label")
            if label is not None and not isinstance(label, str | int):
                raise DataError(f"{listed}: label {label!r}: expected a name or a number")
            try:
                path = inside(folder, row["file_name"])
            except CheckpointError as error:
                raise DataError(f"{listed}: {error}") from None
            caption = row.get("caption", row.get("text"))
            yield Item(row["file_name"], path=path, label=label, caption=caption)
        return
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not paths:
        raise DataError(f"{folder}: no {', '.join(ENDINGS)} in it")
    for path in paths:
        within = path.relative_to(folder)
        label = within.parts[0] if len(within.parts) > 1 else None
        yield Item(name=str(within), path=path, label=label)


def _from_arrays(path: Path) -> Iterator[Item]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > MAX_BYTES:
            raise DataError(f"{path} unpacks to {unpacked:,} bytes: more than {MAX_BYTES:,}")
        check_growth(unpacked, path)
        with np.load(path, allow_pickle=False) as arrays:
            if "x" not in arrays:
                raise DataError(f"{path} has no array x; {nearest('x', arrays.files)}")
            x = arrays["x"]
            y = arrays.get("y")
            names = arrays.get("name")
    # RuntimeError: an archive that is encrypted, or packed in another way.
    except (zipfile.BadZipFile, ValueError, OSError, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from None
    if x.ndim not in (3, 4) or x.dtype != np.uint8:
        raise DataError(f"{path}: x {x.shape} {x.dtype}: expected uint8 (N, H, W[, C])")
    for name, other in (("y", y), ("name", names)):
        if other is not None and other.shape != x.shape[:1]:
            raise DataError(f"{path}: {name} {other.shape}: expected ({len(x)},)")
    if y is not None and not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{path}: y of type {y.dtype}: expected whole numbers")
    for i, array in enumerate(x):
        yield Item(
            name=str(names[i]) if names is not None else f"{path.name}:{i}",
            array=array,
            label=None if y is None else int(y[i]),
        )


def _from_idx(path: Path) -> Iterator[Item]:
    """The format of MNIST: two zero bytes, the type, the number of axes, their sizes."""
    images = _idx(path, axes=3)
    beside = path.with_name(path.name.replace("-images-", "-labels-").replace("-idx3-", "-idx1-"))
    labels = _idx(beside, axes=1) if beside != path and beside.exists() else None
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{beside}: {len(labels)} labels for {len(images)} pictures")
    for i, array in enumerate(images):
        label = None if labels is None else int(labels[i])
        yield Item(name=f"{path.name}:{i}", array=array, label=label)


def _idx(path: Path, *, axes: int) -> Any:
    head = 4 + 4 * axes
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(head)
            if len(start) < head or start[:4] != bytes([0, 0, 8, axes]):
                raise DataError(f"{path} is not an idx file of {axes} axes of bytes")
            shape = struct.unpack(f">{axes}I", start[4:])
            count = math.prod(shape)
            if count > MAX_BYTES:
                raise DataError(f"{path} holds {count:,} bytes: more than {MAX_BYTES:,}")
            # Memory is taken as the data comes: the header may say anything.
            raw = bytearray()
            for piece in pieces(file, path):
                raw += piece
                if len(raw) > count:
                    break
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None
    if len(raw) != count:
        raise DataError(f"{path}: {len(raw)} bytes of data read, the header says {shape}")
    return np.frombuffer(raw, np.uint8).reshape(shape)


def _from_hub(name: str, source: PictureSource) -> Iterator[Item]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, source.subset, split=source.hub_split)
    except ValueError as error:
        raise DataError(f"{HUB}{name}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(f"{HUB}{name} cannot be fetched: {first}") from error
    return from_dataset(rows, source, name=f"{HUB}{name}")


def from_dataset(rows: Any, source: PictureSource, *, name: str) -> Iterator[Item]:
    """The items of a `datasets` data set with an image feature; labels by their names."""
    if source.image_field not in rows.column_names:
        near = nearest(source.image_field, rows.column_names)
        raise DataError(f"{name} has no column {source.image_field!r}; {near}")
    feature = rows.features.get(source.label_field)
    named = getattr(feature, "int2str", None)
    for i, row in enumerate(rows):
        label = row.get(source.label_field)
        yield Item(
            name=f"{name}:{i}",
            array=row[source.image_field],
            label=named(label) if named and label is not None else label,
            caption=row.get(source.caption_field),
        )
