"""Pixel values as tokens, without loss."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.modalities.image.codec import Report, check_ids, check_pictures, learnt_bytes

BRIGHTEST = 255
# So many of the known values are listed in an error.
LISTED = 8


class Levels:
    """The codec; see `levels`. Id i is the value `values[i]`, the values ascending."""

    name = "levels"
    stride = 1
    receptive_field_margin = 0
    lossless = True

    def __init__(self, *, channels: int, values: Tensor, learns: bool) -> None:
        self.channels = self.codes_per_position = channels
        self.values, self.learns = values, learns

    @property
    def codebook_size(self) -> int:
        """How many values there are."""
        return len(self.values)

    def encode(self, images: Tensor) -> Tensor:
        """Ids (B, H, W), or (B, H, W, C) of several channels; DataError for an unknown value."""
        check_pictures(images, channels=self.channels, stride=1)
        # The id of each value from 0 to 255, -1 where it has none.
        table = torch.full((BRIGHTEST + 1,), -1, dtype=torch.int64, device=images.device)
        known = self.values.to(images.device).long()
        table[known] = torch.arange(len(known), device=images.device)
        ids = table[images.long()]
        if bool((ids < 0).any()):
            raise DataError(self._unknown(int(images[ids < 0][0])))
        return ids[:, 0] if self.channels == 1 else ids.permute(0, 2, 3, 1)

    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=self.codes_per_position)
        images = self.values.to(ids.device)[ids]
        return images[:, None] if self.channels == 1 else images.permute(0, 3, 1, 2)

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Take the values that occur in the pictures; where they were given, only check them."""
        check_pictures(images, channels=self.channels, stride=1)
        if not self.learns:
            self.encode(images)
            return self
        if not len(images):
            raise DataError("0 pictures: need at least 1 to see which values occur")
        self.values = torch.unique(images).cpu()
        if report is not None:
            report(f"{self.codebook_size} values, {self._listed()}")
        return self

    def config(self) -> dict[str, object]:
        """The options that `levels` takes back, with the name."""
        return {"name": self.name, "channels": self.channels, "levels": self.codebook_size}

    def state(self) -> dict[str, Tensor]:
        """`values` (K,) uint8, ascending."""
        return {"values": self.values}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where the values are not as many or ascending."""
        values = learnt_bytes(tensors, "values", (self.codebook_size,))
        if bool((values.long().diff() <= 0).any()):
            raise CheckpointError("the codec's values are not ascending")
        self.values = values

    def _listed(self) -> str:
        shown = ", ".join(map(str, self.values[:LISTED].tolist()))
        return shown + (", ..." if self.codebook_size > LISTED else "")

    def _unknown(self, value: int) -> str:
        near = int(self.values[(self.values.long() - value).abs().argmin()])
        return (
            f"pixel value {value}: this codec knows {self.codebook_size} values "
            f"({self._listed()}); the nearest is {near}"
        )


def levels(*, channels: int = 1, levels: int | None = None, step: int = 1) -> Levels:
    """A codec whose tokens are the pixel values; `channels` ids a pixel.

    Id i is the value i * step, for `levels` ids. Without `levels` there are as many as fit below
    256, until `fit` keeps the values that occur. Either way a picture comes back to the last
    bit, and one with other values is refused.

    >>> levels(levels=17, step=15).decode(torch.tensor([[[0, 1, 16]]])).tolist()
    [[[[0, 15, 240]]]]
    """
    most = BRIGHTEST + 1
    for name, value, stop in (("channels", channels, most), ("step", step, most)):
        if type(value) is not int or not 1 <= value <= stop:
            raise ConfigError(f"codec.{name}={value!r}: expected a whole number from 1 to {stop}")
    fitting = BRIGHTEST // step + 1
    if levels is not None and (type(levels) is not int or not 1 <= levels <= fitting):
        raise ConfigError(
            f"codec.levels={levels!r}: expected 1 to {fitting}, as many as fit with step={step}"
        )
    values = torch.arange(levels or fitting) * step
    return Levels(channels=channels, values=values.to(torch.uint8), learns=levels is None)
