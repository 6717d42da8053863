"""Where pictures come from: folders, arrays, MNIST files, scikit-learn's digits, data sets."""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mdiff.emoji import base_of, caption_of
from mdiff.errors import BackendError, ConfigError, DataError, nearest
from mdiff.sources import HUB, SPLITS, json_lines, read_text

DIGITS = "sklearn.digits"
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
METADATA = "metadata.jsonl"
# A picture of more pixels is taken for a decompression bomb.
MAX_PIXELS = 2**26
# The largest array that is read from a file.
MAX_BYTES = 2**34
MODES = {1: "L", 3: "RGB"}
# Pillow's modes that become these without a choice of what 16 bits or a float mean.
EIGHT_BIT = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
CAPTIONS = ("none", "data", "unicode")


@dataclass(frozen=True)
class PictureSource:
    """The `data` section of a recipe for pictures.

    `source`: a path or a list of paths, or "sklearn.digits", or "hub:OWNER/NAME". A path is a
    folder of pictures (its subfolders name the labels, or metadata.jsonl has lines with
    file_name, label and caption), one picture, an .npz with `x` uint8 (N, H, W[, C]) and
    perhaps `y` and `name`, an MNIST file (*-images-idx3-ubyte[.gz], its labels beside it), or
    a folder of tokens that `mdiff tokenizer encode` wrote. `resize` crops the middle and
    scales it to the codec's size; without it, another size is an error. `captions`: none,
    "data", or "unicode" for files named after code points (variants of one base then stay on
    one side of a split). `flip` and `shift` (pixels each way) add variants to the training
    split; a caption that says left or right is not flipped.

    `holdout` is the fraction cut from the end, `validation` that cut from the end of what is
    left; where there are groups, whole groups by their digest.
    """

    source: str | list[str]
    image_field: str = "image"
    label_field: str = "label"
    caption_field: str = "caption"
    subset: str | None = None
    hub_split: str = "train"
    resize: bool = False
    captions: str = "none"
    flip: bool = False
    shift: int = 0
    holdout: float = 0.1
    validation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("holdout", "validation"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1:
                raise ConfigError(f"data.{name}={value!r}: expected 0 or more and less than 1")
        paths = [self.source] if isinstance(self.source, str) else self.source
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
            raise ConfigError(f"data.source={self.source!r}: expected a path or a list of paths")
        if self.captions not in CAPTIONS:
            raise ConfigError(
                f"data.captions={self.captions!r}; {nearest(self.captions, CAPTIONS)}"
            )
        if type(self.shift) is not int or not 0 <= self.shift <= 8:
            raise ConfigError(f"data.shift={self.shift!r}: expected 0 to 8 pixels")
        for name in ("resize", "flip"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"data.{name}={getattr(self, name)!r}: expected true or false")

    @classmethod
    def of(cls, options: Mapping[str, Any] | PictureSource | str) -> PictureSource:
        """From a mapping, or from a path with the defaults; unknown keys are ConfigErrors."""
        if isinstance(options, PictureSource):
            return options
        if isinstance(options, str | Path):
            return cls(source=str(options))
        known = [each.name for each in fields(cls)]
        for key in options:
            if key not in known:
                near = nearest(f"data.{key}", [f"data.{name}" for name in known])
                raise ConfigError(f"unknown key data.{key}; {near}")
        if "source" not in options:
            raise ConfigError("data.source is missing: expected a path or a list of them")
        return cls(**options)

    @property
    def paths(self) -> list[str]:
        """The sources as a list."""
        return [self.source] if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size with what is known of each.

    `pixels` (N, C, H, W) uint8; `labels` (N,) int64 into `label_names`, None without labels;
    `captions` one a picture or None; `groups` what must stay on one side of a split, or None;
    `names` of files or of items; `problems`, a line for each file that could not be read.
    """

    pixels: Tensor
    names: list[str]
    labels: Tensor | None = None
    label_names: list[str] = field(default_factory=list)
    captions: list[str] | None = None
    groups: list[str] | None = None
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def at(self, index: Tensor) -> Pictures:
        """Those numbered `index` (M,) int64."""
        chosen = index.tolist()
        return replace(
            self,
            pixels=self.pixels[index],
            names=[self.names[i] for i in chosen],
            labels=None if self.labels is None else self.labels[index],
            captions=None if self.captions is None else [self.captions[i] for i in chosen],
            groups=None if self.groups is None else [self.groups[i] for i in chosen],
        )

    def split(self, split: str, *, holdout: float, validation: float) -> Pictures:
        """Those of a split: cut by order, or whole groups by digest; DataError if it is empty."""
        chosen = self.at(split_index(self.groups or len(self), split, holdout, validation))
        if not len(chosen):
            raise DataError(
                f"the {split} split of {len(self)} pictures is empty at holdout={holdout}, "
                f"validation={validation}"
            )
        return chosen


def split_index(
    groups: Sequence[str] | int, split: str, holdout: float, validation: float
) -> Tensor:
    """The numbers of a split's items, (M,) int64, of items in order or of groups' names."""
    if split == "all":
        return torch.arange(groups if isinstance(groups, int) else len(groups))
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}; {nearest(split, SPLITS)}")
    if isinstance(groups, int):
        kept = int(groups * (1 - holdout))
        chosen = int(kept * (1 - validation))
        first, stop = {"train": (0, chosen), "validation": (chosen, kept)}.get(
            split, (kept, groups)
        )
        return torch.arange(first, stop)
    place = [_share(group) for group in groups]
    inner = (1 - holdout) * (1 - validation)
    side = [
        "train" if at < inner else "validation" if at < 1 - holdout else "holdout" for at in place
    ]
    return torch.tensor([i for i, name in enumerate(side) if name == split], dtype=torch.int64)


def _share(group: str) -> float:
    """A number in [0, 1) that is the group's own."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:6], "big") / 2**48


def read_pictures(
    source: PictureSource | Mapping[str, Any] | str,
    *,
    channels: int,
    size: tuple[int, int] | None = None,
    strict: bool = True,
) -> Pictures:
    """Every picture of a source, in `channels` (1 grey, 3 RGB; clear parts on white).

    `size` (H, W) is what they must have or, with `resize`, get; None takes the first one's.
    With `strict` the first unreadable file raises DataError; without, it becomes a problem.
    """
    source = PictureSource.of(source)
    if channels not in MODES:
        raise ConfigError(f"channels={channels}: expected 1 or 3")
    taken = _Taken(channels, size, source.resize, strict)
    for path in source.paths:
        for item in _items(path, source):
            taken.add(item)
    found = taken.pictures(source)
    if source.captions == "unicode":
        captions = [caption_of(name) for name in found.names]
        return replace(found, captions=captions, groups=[base_of(n) for n in found.names])
    if source.captions == "data" and found.captions is None:
        raise DataError(f"{source.source}: there is no caption in it")
    return found if source.captions == "data" else replace(found, captions=None)


@dataclass
class _Item:
    """One picture as it was found; `array` uint8 (H, W[, C]), or a `path` to read."""

    name: str
    array: Any = None
    path: Path | None = None
    label: str | int | None = None
    caption: str | None = None


class _Taken:
    """Gathers items into one array, checking each."""

    def __init__(
        self, channels: int, size: tuple[int, int] | None, resize: bool, strict: bool
    ) -> None:
        self.channels, self.size, self.resize, self.strict = channels, size, resize, strict
        self.arrays: list[Any] = []
        self.items: list[_Item] = []
        self.problems: list[str] = []

    def add(self, item: _Item) -> None:
        try:
            array = item.array if item.path is None else open_picture(item.path)
            plain = as_array(array, channels=self.channels, name=item.name)
            self.size = self.size or (plain.shape[0], plain.shape[1])
            self.arrays.append(_sized(plain, self.size, resize=self.resize, name=item.name))
            self.items.append(replace(item, array=None))
        except DataError as error:
            if self.strict:
                raise
            self.problems.append(str(error))

    def pictures(self, source: PictureSource) -> Pictures:
        if not self.arrays:
            more = f"; {self.problems[0]}" if self.problems else ""
            raise DataError(f"{source.source}: there is no picture in it{more}")
        pixels = torch.from_numpy(np.stack(self.arrays)).permute(0, 3, 1, 2).contiguous()
        labels, names = _numbered([item.label for item in self.items], source)
        captions = [item.caption for item in self.items]
        return Pictures(
            pixels=pixels,
            names=[item.name for item in self.items],
            labels=labels,
            label_names=names,
            captions=None if None in captions else [str(each) for each in captions],
            problems=self.problems,
        )


def _numbered(
    labels: list[str | int | None], source: PictureSource
) -> tuple[Tensor | None, list[str]]:
    """Labels as numbers, and their names in order; numbers are their own names."""
    if all(label is None for label in labels):
        return None, []
    if any(label is None for label in labels):
        raise DataError(f"{source.source}: some pictures have a label and some have none")
    if all(isinstance(label, int) for label in labels):
        top = max(int(label) for label in labels if label is not None)
        return torch.tensor(labels, dtype=torch.int64), [str(i) for i in range(top + 1)]
    names = sorted({str(label) for label in labels})
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[str(label)] for label in labels], dtype=torch.int64), names


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
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        white = Image.new("RGBA", clear.size, "white")
        picture = Image.alpha_composite(white, clear)
    array = np.array(picture.convert(MODES[channels]))
    return array if array.ndim == 3 else array[..., None]


def open_picture(path: Path | str) -> Image.Image:
    """The picture in a file; DataError where it is missing, unreadable, cut short or huge."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        # Opening reads the header alone: the size is known before anything is unpacked.
        picture = Image.open(path)
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


def _sized(array: Any, size: tuple[int, int], *, resize: bool, name: str) -> Any:
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


def _items(path: str, source: PictureSource) -> Iterator[_Item]:
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
    return iter([_Item(name=str(place), path=place)])


def _digits() -> Iterator[_Item]:
    """The 1,797 digits of 8 x 8; their 17 greys 0 to 16 are 0 to 240."""
    from sklearn.datasets import load_digits

    found = load_digits()
    for number, (array, label) in enumerate(zip(found.images, found.target)):
        yield _Item(name=f"{number}", array=(array * 15).astype(np.uint8), label=int(label))


def _from_folder(folder: Path) -> Iterator[_Item]:
    listed = folder / METADATA
    if listed.exists():
        for row in json_lines(read_text(listed), listed, "file_name"):
            label = row.get("label")
            if label is not None and not isinstance(label, str | int):
                raise DataError(f"{listed}: label {label!r}: expected a name or a number")
            path = folder / row["file_name"]
            if not path.resolve().is_relative_to(folder.resolve()):
                raise DataError(f"{listed}: {row['file_name']!r} leaves the folder")
            caption = row.get("caption", row.get("text"))
            yield _Item(row["file_name"], path=path, label=label, caption=caption)
        return
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    if not paths:
        raise DataError(f"{folder}: no {', '.join(ENDINGS)} in it")
    for path in paths:
        inside = path.relative_to(folder)
        label = inside.parts[0] if len(inside.parts) > 1 else None
        yield _Item(name=str(inside), path=path, label=label)


def _from_arrays(path: Path) -> Iterator[_Item]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > MAX_BYTES:
            raise DataError(f"{path} unpacks to {unpacked:,} bytes: more than {MAX_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            if "x" not in arrays:
                raise DataError(f"{path} has no array x; {nearest('x', arrays.files)}")
            x = arrays["x"]
            y = arrays.get("y")
            names = arrays.get("name")
    except (zipfile.BadZipFile, ValueError, OSError, zlib.error, EOFError) as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from None
    if x.ndim not in (3, 4) or x.dtype != np.uint8:
        raise DataError(f"{path}: x {x.shape} {x.dtype}: expected uint8 (N, H, W[, C])")
    for name, other in (("y", y), ("name", names)):
        if other is not None and other.shape != x.shape[:1]:
            raise DataError(f"{path}: {name} {other.shape}: expected ({len(x)},)")
    if y is not None and not np.issubdtype(y.dtype, np.integer):
        raise DataError(f"{path}: y of type {y.dtype}: expected whole numbers")
    for i, array in enumerate(x):
        yield _Item(
            name=str(names[i]) if names is not None else f"{path.name}:{i}",
            array=array,
            label=None if y is None else int(y[i]),
        )


def _from_idx(path: Path) -> Iterator[_Item]:
    """The format of MNIST: two zero bytes, the type, the number of axes, their sizes."""
    images = _idx(path, axes=3)
    beside = path.with_name(path.name.replace("-images-", "-labels-").replace("-idx3-", "-idx1-"))
    labels = _idx(beside, axes=1) if beside != path and beside.exists() else None
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{beside}: {len(labels)} labels for {len(images)} pictures")
    for i, array in enumerate(images):
        label = None if labels is None else int(labels[i])
        yield _Item(name=f"{path.name}:{i}", array=array, label=label)


def _idx(path: Path, *, axes: int) -> Any:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(MAX_BYTES)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None
    head = 4 + 4 * axes
    if len(raw) < head or raw[:4] != bytes([0, 0, 8, axes]):
        raise DataError(f"{path} is not an idx file of {axes} axes of bytes")
    shape = struct.unpack(f">{axes}I", raw[4:head])
    if len(raw) - head != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: {len(raw) - head} bytes of data, the header says {shape}")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _from_hub(name: str, source: PictureSource) -> Iterator[_Item]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, source.subset, split=source.hub_split)
    except ValueError as error:
        raise DataError(f"{HUB}{name}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackendError(f"{HUB}{name} cannot be fetched: {first}") from error
    return from_dataset(rows, source, name=f"{HUB}{name}")


def from_dataset(rows: Any, source: PictureSource, *, name: str) -> Iterator[_Item]:
    """The items of a `datasets` data set with an image feature; labels by their names."""
    if source.image_field not in rows.column_names:
        near = nearest(source.image_field, rows.column_names)
        raise DataError(f"{name} has no column {source.image_field!r}; {near}")
    feature = rows.features.get(source.label_field)
    named = getattr(feature, "int2str", None)
    for i, row in enumerate(rows):
        label = row.get(source.label_field)
        yield _Item(
            name=f"{name}:{i}",
            array=row[source.image_field],
            label=named(label) if named and label is not None else label,
            caption=row.get(source.caption_field),
        )


def digest_of(pictures: Pictures) -> str:
    """SHA-256 of the pixels, labels and captions: what a model's card names as its data."""
    total = hashlib.sha256(pictures.pixels.numpy().tobytes())
    if pictures.labels is not None:
        total.update(pictures.labels.numpy().astype("<i8").tobytes())
    if pictures.captions is not None:
        total.update(json.dumps(pictures.captions).encode())
    return total.hexdigest()
