"""Where pictures come from: folders, arrays, MNIST files, scikit-learn's digits, data sets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError, nearest
from mdiff.modalities.image.data.readers import (
    MODES,
    Item,
    as_array,
    check_words,
    items_of,
    open_picture,
    sized,
)
from mdiff.modalities.image.data.unicode_names import base_of, caption_of
from mdiff.modalities.text.documents import SPLITS

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
        for item in items_of(path, source):
            taken.add(item)
    found = taken.pictures(source)
    if source.captions == "unicode":
        captions = [caption_of(name) for name in found.names]
        return replace(found, captions=captions, groups=[base_of(n) for n in found.names])
    if source.captions == "data" and found.captions is None:
        raise DataError(f"{source.source}: there is no caption in it")
    return found if source.captions == "data" else replace(found, captions=None)


class _Taken:
    """Gathers items into one array, checking each."""

    def __init__(
        self, channels: int, size: tuple[int, int] | None, resize: bool, strict: bool
    ) -> None:
        self.channels, self.size, self.resize, self.strict = channels, size, resize, strict
        self.arrays: list[Any] = []
        self.items: list[Item] = []
        self.problems: list[str] = []

    def add(self, item: Item) -> None:
        try:
            check_words(item)
            array = item.array if item.path is None else open_picture(item.path)
            plain = as_array(array, channels=self.channels, name=item.name)
            self.size = self.size or (plain.shape[0], plain.shape[1])
            self.arrays.append(sized(plain, self.size, resize=self.resize, name=item.name))
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


def digest_of(pictures: Pictures) -> str:
    """SHA-256 of the pixels, labels and captions: what a model's card names as its data."""
    total = hashlib.sha256(pictures.pixels.numpy().tobytes())
    if pictures.labels is not None:
        total.update(pictures.labels.numpy().astype("<i8").tobytes())
    if pictures.captions is not None:
        total.update(json.dumps(pictures.captions).encode())
    return total.hexdigest()
