"""Image data sets in memory: pictures of one size, with labels, captions and splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError, nearest
from mdiff.modalities.image.data.pixels import MODES, Pixels, as_array, sized
from mdiff.modalities.image.data.readers import Item, check_words, items_of
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.data.unicode_names import base_of, caption_of
from mdiff.modalities.image.labels import numbered
from mdiff.modalities.text.source import SPLITS


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
        """Those of a split, see `split_index`; DataError if it is empty."""
        return self.at(split_of(self, split, holdout=holdout, validation=validation))


class Items(Protocol):
    """What a split is made of: items in order, perhaps labelled, or in groups to keep whole."""

    @property
    def groups(self) -> list[str] | None: ...
    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...


def split_of(items: Items, split: str, *, holdout: float, validation: float) -> Tensor:
    """The numbers of a split's items, (M,) int64; DataError where there are none."""
    index = split_index(items.groups or len(items), split, holdout, validation, items.labels)
    if not len(index):
        raise DataError(
            f"the {split} split of {len(items)} pictures is empty at holdout={holdout}, "
            f"validation={validation}"
        )
    return index


def split_index(
    groups: Sequence[str] | int, split: str, holdout: float, validation: float,
    labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The numbers of a split's items, (M,) int64 ascending.

    Groups, by their names, are on the side that their digest says. A number of items is cut from
    the end; where their labels (N,) come one after another, or the cut would leave one without
    an item, each label's are.
    """
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
        if labels is None or not len(labels) or _are_mixed(labels, kept):
            return torch.arange(first, stop)
        return _by_turns(labels)[first:stop].sort().values
    inner = (1 - holdout) * (1 - validation)
    share = [_share(group) for group in groups]
    side = [
        "train" if at < inner else "validation" if at < 1 - holdout else "holdout" for at in share
    ]
    return torch.tensor([i for i, name in enumerate(side) if name == split], dtype=torch.int64)


def _are_mixed(labels: Tensor, kept: int) -> bool:
    """Whether labels (N,) change at least half as often as in a random order, and the first
    `kept` of them hold every one.
    """
    if int(labels.min()) < 0:
        raise DataError(f"label {int(labels.min())}: expected 0 or more")
    counts = labels.bincount()
    random = (len(labels) - 1) * (1 - float((counts.double() / len(labels)).square().sum()))
    changes = int((labels[1:] != labels[:-1]).sum())
    kept_counts = labels[:kept].bincount(minlength=len(counts))
    return changes >= random / 2 and not bool(((counts > 0) & (kept_counts == 0)).any())


def _by_turns(labels: Tensor) -> Tensor:
    """The items' numbers in an order of which any beginning holds the same share of each label.

    It begins with the first item of each; a label's items stay in order.
    """
    order, counts = labels.argsort(stable=True), labels.bincount()
    first = (counts.cumsum(0) - counts)[labels[order]]
    turn = torch.empty(len(labels), dtype=torch.float64)
    turn[order] = (torch.arange(len(labels)) - first).double() / counts[labels[order]]
    return turn.argsort(stable=True)


def _share(group: str) -> float:
    """A number in [0, 1) that is the group's own."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:6], "big") / 2**48


def read_pictures(
    source: PictureSource | Mapping[str, object] | str,
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
    arrays: list[Pixels] = []
    items: list[Item] = []
    problems: list[str] = []
    for item in chain.from_iterable(items_of(path, source) for path in source.paths):
        try:
            check_words(item, captions=source.captions == "data")
            plain = as_array(item.array, channels=channels, name=item.name)
            size = size or (plain.shape[0], plain.shape[1])
            arrays.append(sized(plain, size, resize=source.resize, name=item.name))
            items.append(replace(item, given=None))
        except DataError as error:
            if strict:
                raise
            problems.append(str(error))
    if not arrays:
        more = f"; {problems[0]}" if problems else ""
        raise DataError(f"{source.source}: there is no picture in it{more}")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    names = [item.name for item in items]
    labels, label_names = numbered([item.label for item in items], names)
    captions = groups = None
    if source.captions == "unicode":
        captions, groups = [caption_of(name) for name in names], [base_of(name) for name in names]
    if source.captions == "data":
        if any(item.caption is None for item in items):
            raise DataError(f"{source.source}: there is no caption in it")
        captions = [str(item.caption) for item in items]
    return Pictures(pixels, names, labels, label_names, captions, groups, problems)


def digest_of(pictures: Pictures) -> str:
    """SHA-256 of the pixels, labels and captions: what a model's card names as its data."""
    total = hashlib.sha256(pictures.pixels.numpy().tobytes())
    if pictures.labels is not None:
        total.update(pictures.labels.numpy().astype("<i8").tobytes())
    if pictures.captions is not None:
        total.update(json.dumps(pictures.captions).encode())
    return total.hexdigest()
