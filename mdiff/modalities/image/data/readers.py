"""Pictures one by one: out of folders, arrays, MNIST files, scikit-learn's digits, data sets."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from mdiff.errors import CheckpointError, DataError, nearest, warn
from mdiff.files import inside
from mdiff.modalities.image.data.pixels import ENDINGS, Pixels, decoded, open_picture
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.data.walk import walk
from mdiff.modalities.image.labels import checked
from mdiff.modalities.text.documents import check_growth, hub_rows, json_lines, pieces, read_text
from mdiff.modalities.text.source import HUB

DIGITS = "sklearn.digits"
METADATA = "metadata.jsonl"
# MNIST's name for a file of pictures; some archives have a dot in it.
IDX = re.compile(r"[-.]idx3-ubyte")
# The largest array that is read from a file.
MAX_BYTES = 2**34


@dataclass
class Item:
    """One picture as it was found: `given` is an array uint8, a file's path, or its content."""

    name: str
    given: object = None
    label: object = None
    caption: object = None

    @property
    def array(self) -> object:
        """The array, or the picture in the file; DataError where that is unreadable."""
        if isinstance(self.given, bytes):
            return decoded(self.given, self.name)
        return open_picture(self.given) if isinstance(self.given, Path) else self.given


def check_words(item: Item, *, captions: bool) -> None:
    """DataError where name, label or caption is no text, or holds half a character."""
    if item.label is not None:
        checked(item.label, f"{item.name}: label")
    if captions and not isinstance(item.caption, str | None):
        raise DataError(f"{item.name}: caption {item.caption!r:.60}: expected a string")
    for kind, words in (("name", item.name), ("caption", item.caption)):
        try:
            str(words).encode()
        except UnicodeEncodeError:
            raise DataError(f"{item.name}: its {kind} is not text in UTF-8") from None


def items_of(path: str, source: PictureSource) -> Iterator[Item]:
    """The pictures of one of the source's paths."""
    if path == DIGITS:
        return _digits()
    if path.startswith(HUB):
        rows = hub_rows(path.removeprefix(HUB), source.subset, source.hub_split)
        return from_dataset(rows, source, name=path)
    file = Path(path)
    if file.is_dir():
        return _from_folder(file)
    if path.endswith(".npz"):
        return _from_arrays(file)
    if IDX.search(file.name):
        return _from_idx(file)
    return iter([Item(name=str(file), given=file)])


def _digits() -> Iterator[Item]:
    """The 1,797 digits of 8 x 8; their 17 greys 0 to 16 are 0 to 240."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (array, label) in enumerate(zip(found.images, found.target)):
        yield Item(name=f"{number}", given=(array * 15).astype(np.uint8), label=int(label))


def _from_folder(folder: Path) -> Iterator[Item]:
    if os.path.lexists(folder / METADATA):
        return _from_metadata(folder, folder / METADATA)
    found = walk(folder, ENDINGS)
    if not found.files:
        raise DataError(f"{found.line or folder}: no {', '.join(ENDINGS)} in it")
    if found.line:
        warn(found.line)
    each = ((path, path.relative_to(folder)) for path in found.files)
    return (Item(str(name), given=path, label=next(iter(name.parts[:-1]), None))
            for path, name in each)  # fmt: skip


def _from_metadata(folder: Path, listed: Path) -> Iterator[Item]:
    if not listed.is_file():
        raise DataError(f"{listed} is not a plain file")
    named = set()
    for row in json_lines(read_text(listed), listed, "file_name"):
        name = str(row["file_name"])
        try:
            # Links lead where their owner wants; the names are another's.
            path = inside(folder, name, root=Path("/"))
        except CheckpointError as error:
            raise DataError(f"{listed}: {error}") from None
        named.add(path)
        yield Item(name, given=path, label=row.get("label"),
                   caption=row.get("caption", row.get("text")))  # fmt: skip
    others = sum(path not in named for path in walk(folder, ENDINGS).files)
    if others:
        warn(f"{listed}: {others} files of pictures beside it are not in it, and left out")


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
            given=array,
            label=None if y is None else checked(y[i], f"{path}: y[{i}]"),
        )


def _from_idx(path: Path) -> Iterator[Item]:
    """The format of MNIST: two zero bytes, the type, the number of axes, their sizes."""
    images = _idx(path, axes=3)
    beside = path.with_name(re.sub(r"([-.])images([-.])idx3-", r"\1labels\2idx1-", path.name))
    labels = _idx(beside, axes=1) if beside != path and beside.exists() else None
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{beside}: {len(labels)} labels for {len(images)} pictures")
    for i, array in enumerate(images):
        label = None if labels is None else int(labels[i])
        yield Item(name=f"{path.name}:{i}", given=array, label=label)


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


class ImageRows(Protocol):
    """What is read of a data set of the library `datasets`."""

    @property
    def column_names(self) -> list[str]: ...
    @property
    def features(self) -> Mapping[str, object]: ...
    def cast_column(self, column: str, feature: object) -> ImageRows: ...
    def __iter__(self) -> Iterator[Mapping[str, object]]: ...


def from_dataset(rows: ImageRows, source: PictureSource, *, name: str) -> Iterator[Item]:
    """The items of a `datasets` data set with an image feature; labels by their names."""
    from datasets import ClassLabel, Image

    column = source.image_field
    if column not in rows.column_names:
        raise DataError(f"{name} has no column {column!r}; {nearest(column, rows.column_names)}")
    if isinstance(rows.features.get(column), Image):
        # The files are opened here: the library opens any format, and stops at the first bad one.
        rows = rows.cast_column(column, Image(decode=False))
    feature = rows.features.get(source.label_field)
    for i, row in enumerate(rows):
        label, picture = row.get(source.label_field), row[column]
        if isinstance(feature, ClassLabel) and isinstance(label, int) and label >= 0:
            label = feature.int2str(label)
        if isinstance(picture, Mapping):
            picture = picture.get("bytes") or Path(str(picture.get("path")))
        yield Item(f"{name}:{i}", given=picture, label=label,
                   caption=row.get(source.caption_field))  # fmt: skip
