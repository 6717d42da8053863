"""Pictures one by one: out of folders, arrays, MNIST files, scikit-learn's digits, data sets."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mdiff.errors import CheckpointError, DataError, nearest
from mdiff.files import inside
from mdiff.modalities.image.data.pixels import Pixels
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.text.documents import (
    check_growth,
    hub_rows,
    json_lines,
    pieces,
    read_text,
)
from mdiff.modalities.text.source import HUB

DIGITS = "sklearn.digits"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
METADATA = "metadata.jsonl"
# The largest array that is read from a file.
MAX_BYTES = 2**34


@dataclass
class Item:
    """One picture as it was found; `array` uint8 (H, W[, C]), or a `path` to read."""

    name: str
    array: object = None
    path: Path | None = None
    label: object = None
    caption: object = None


def check_words(item: Item) -> None:
    """DataError where a name, label or caption holds half a character, which no file can hold."""
    for kind, words in (("name", item.name), ("label", item.label), ("caption", item.caption)):
        try:
            str(words).encode()
        except UnicodeEncodeError:
            raise DataError(f"{item.name}: its {kind} is not text in UTF-8") from None


def items_of(path: str, source: PictureSource) -> Iterator[Item]:
    """The pictures of one of the source's paths."""
    if path == DIGITS:
        return _digits()
    if path.startswith(HUB):
        return _from_hub(path.removeprefix(HUB), source)
    file = Path(path)
    if file.is_dir():
        return _from_folder(file)
    if path.endswith(".npz"):
        return _from_arrays(file)
    if "-idx3-ubyte" in file.name:
        return _from_idx(file)
    return iter([Item(name=str(file), path=file)])


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
            name = str(row["file_name"])
            try:
                path = inside(folder, name)
            except CheckpointError as error:
                raise DataError(f"{listed}: {error}") from None
            caption = row.get("caption", row.get("text"))
            yield Item(name, path=path, label=label, caption=caption)
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


def _idx(path: Path, *, axes: int) -> Pixels:
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
    rows = hub_rows(name, source.subset, source.hub_split)
    return from_dataset(rows, source, name=f"{HUB}{name}")


class ImageRows(Protocol):
    """What is read of a data set of the library `datasets`."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def features(self) -> Mapping[str, object]: ...
    def __iter__(self) -> Iterator[Mapping[str, object]]: ...


def from_dataset(rows: ImageRows, source: PictureSource, *, name: str) -> Iterator[Item]:
    """The items of a `datasets` data set with an image feature; labels by their names."""
    from datasets import ClassLabel

    if source.image_field not in rows.column_names:
        near = nearest(source.image_field, rows.column_names)
        raise DataError(f"{name} has no column {source.image_field!r}; {near}")
    feature = rows.features.get(source.label_field)
    for i, row in enumerate(rows):
        label = row.get(source.label_field)
        if isinstance(feature, ClassLabel) and label is not None:
            label = feature.int2str(label)
        yield Item(f"{name}:{i}", row[source.image_field], label=label,
                   caption=row.get(source.caption_field))  # fmt: skip
