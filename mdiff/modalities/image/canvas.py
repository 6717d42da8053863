"""The canvas of an image model: its parts, their positions and ids, and what they stand for."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.errors import ConfigError, nearest
from mdiff.modalities.image.captions import Captions
from mdiff.modalities.image.codec import Codec
from mdiff.modalities.image.labels import ROLES, Labels
from mdiff.modalities.protocol import Description
from mdiff.tokens import TokenSpace


class Part(NamedTuple):
    """A run of a canvas, `layout` (h, w, codes per position): its positions and its ids."""

    layout: tuple[int, int, int]
    span: slice
    ids: range


class ImageCanvas:
    """The image's positions row by row, each with its codes side by side, then the label's position
    and the caption's positions where these are parts; the ids of the parts lie one after the other,
    then the mask. `size` (H, W) pixels; `label` is what a label is, one of `ROLES`, and `labels`
    are None until they are learnt from data.
    """

    def __init__(
        self, codec: Codec, *, size: tuple[int, int], label: str = "none",
        labels: Labels | None = None, captions: Captions | None = None,
    ) -> None:  # fmt: skip
        if label not in ROLES:
            raise ConfigError(f"modality.label={label!r}; {nearest(str(label), ROLES)}")
        self.codec, self.size, self.captions = codec, size, captions
        self.label, self._labels = label, labels

    @property
    def unit(self) -> str:
        """The unit of an image alone: "dim" of pixels, or "pixel" of a code; else "token"."""
        if len(self.part_names) > 1:
            return "token"
        return "dim" if self.codec.lossless else "pixel"

    @property
    def labels(self) -> list[str] | None:
        """The names of the labels by number, None where they are not known."""
        return None if self._labels is None else list(self._labels.names)

    @property
    def known_labels(self) -> Labels:
        """The labels; ConfigError where they are not known yet."""
        if self._labels is None:
            raise ConfigError("the labels are not known yet: give modality.labels or data first")
        return self._labels

    @property
    def latent_grid(self) -> tuple[int, int]:
        """The image's positions (h, w)."""
        return self.size[0] // self.codec.stride, self.size[1] // self.codec.stride

    @property
    def grid(self) -> tuple[int, int]:
        """The image's tokens as a grid, the codes of a position side by side."""
        return self.latent_grid[0], self.latent_grid[1] * self.codec.codes_per_position

    @property
    def parts(self) -> dict[str, Part]:
        """The parts of a canvas by name, one after the other in positions and in ids."""
        sizes = {"image": ((*self.latent_grid, self.codec.codes_per_position),
                           self.codec.codebook_size)}  # fmt: skip
        if self.label == "part":
            sizes["label"] = (1, 1, 1), len(self.known_labels.names)
        if self.captions:
            sizes["caption"] = (1, self.captions.length, 1), self.captions.size
        found, start, first = dict[str, Part](), 0, 0
        for name, (layout, ids) in sizes.items():
            stop, last = start + math.prod(layout), first + ids
            found[name] = Part(layout, slice(start, stop), range(first, last))
            start, first = stop, last
        return found

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the canvas's parts, in order."""
        more = ["label"] if self.label == "part" else []
        return ("image", *more, *(["caption"] if self.captions else []))

    @property
    def takes(self) -> tuple[str, ...]:
        """The keys of a prompt."""
        return (*self.part_names, *(["label"] if self.label == "condition" else []))

    @property
    def layout(self) -> list[tuple[int, int, int]]:
        """The canvas as runs of (h, w, codes per position), for a backbone's positions."""
        return [part.layout for part in self.parts.values()]

    @property
    def space(self) -> TokenSpace:
        """Ids of all parts, each part's own where there is more than one, and the mask after."""
        runs = [(math.prod(p.layout), p.ids.start, p.ids.stop) for p in self.parts.values()]
        ids = runs[-1][2]
        return TokenSpace(ids, mask_id=ids, parts=tuple(runs) if len(runs) > 1 else ())

    @property
    def length(self) -> int:
        """Tokens of a canvas."""
        return sum(math.prod(layout) for layout in self.layout)

    def span(self, part: str) -> slice:
        """The positions of a part; ConfigError, with the nearest name, where there is none."""
        if part not in self.parts:
            raise ConfigError(f"this model has no {part}; {nearest(part, self.part_names)}")
        return self.parts[part].span

    @property
    def classes(self) -> int:
        """How many labels are a condition; 0 where labels are no condition."""
        return len(self.known_labels.names) if self.label == "condition" else 0

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """The null condition: the label after the last, {} where labels are no condition."""
        return {"label": torch.tensor([self.classes], device="cpu")} if self.classes else {}

    def label_id(self, label: object) -> int:
        """The number of a label by its name or number; DataError with the nearest names."""
        return self.known_labels.number(label)

    def own_labels(self, labels: Tensor | None, names: Sequence[str]) -> Tensor | None:
        """Labels (N,) int64 into `names` as this model's numbers; see `Labels.own`."""
        if self.label == "none" or labels is None:
            return labels
        return self.known_labels.own(labels, names)

    def _caption_ids(self, captions: Captions, caption: str, *, cut: bool = False) -> list[int]:
        """The caption's ids in the canvas; one that is too long is cut, or a DataError."""
        ids = self.parts["caption"].ids
        return [ids[i] for i in captions.encode(caption, cut=cut)]

    def described(self, ids: Sequence[int]) -> Description:
        """The label and the caption of a canvas, where they are parts."""
        label = caption = None
        if "label" in self.part_names:
            own, token = self.parts["label"].ids, ids[self.span("label").start]
            label = self.known_labels.names[own.index(token)] if token in own else None
        if self.captions:
            caption = self._caption(self.captions, ids[self.span("caption")])
        return Description(label, caption)

    def _caption(self, captions: Captions, ids: Sequence[int]) -> str:
        own = self.parts["caption"].ids
        return captions.decode([own.index(token) if token in own else None for token in ids])

    def pieces(self, ids: Sequence[int]) -> list[str | None]:
        """Each token as its number, None where it is masked; captions as text."""
        mask = self.space.mask_id
        written = [None if token == mask else f"{token} " for token in ids]
        if self.captions:
            for position in range(*self.span("caption").indices(len(ids))):
                if ids[position] != mask:
                    written[position] = self._caption(self.captions, [ids[position]])
        return written

    def sizes(self, items: Sequence[object]) -> dict[str, int]:
        """How many units the items have, beside their tokens."""
        pixels = len(items) * self.size[0] * self.size[1]
        if self.unit == "token":
            return {}
        return {"dim": pixels * self.codec.channels} if self.unit == "dim" else {"pixel": pixels}
