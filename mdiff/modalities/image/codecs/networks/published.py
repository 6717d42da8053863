"""What the codecs of other projects share: their config.json, their pixels, their files.

A family has one file in codecs/. Its module's parameters have the names of the published
files; `recognises` says which config.json is its own, and its function makes the module of
one: `codec.load_codec` then reads the weights as they lie in the folder.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import CONFIG, Fields
from mdiff.modalities.image.codec import PUBLISHED_TENSORS, Report, check_ids, check_pictures
from mdiff.modalities.image.codecs.networks.fit import check_state
from mdiff.modalities.image.codecs.networks.vqgan import GROUPS

# Pixels coded at a time: 128 features each at the finest level take 512 MB.
PIXELS_AT_ONCE = 1 << 20
MOST_LEVELS, MOST_MULTIPLIER, MOST_BLOCKS = 10, 64, 32


class PublishedCodec(nn.Module):
    """A Codec that another project trained; a family writes the four steps between.

    `described` is its config.json. Inside, pixels are in [-1, 1], or in [0, 1] where `signed` is
    false. `optional` are buffers that files may hold and nothing here reads.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = True
    channels = 3
    codes_per_position = 1
    # Attention and group norms read the whole picture.
    receptive_field_margin: int | None = None
    lossless = False

    def __init__(
        self, described: Mapping[str, Any], *, stride: int, codebook_size: int, channels: int
    ) -> None:
        super().__init__()
        self.described = dict(described)
        self.stride, self.codebook_size, self.channels = stride, codebook_size, channels
        self.kept: set[str] = set()

    @abstractmethod
    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) float to what is quantised (B, D, h, w)."""

    @abstractmethod
    def ids(self, latents: Tensor) -> Tensor:
        """The ids (B, h, w[, n]) int64 of latents (B, D, h, w)."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """What the decoder is given of ids: (B, D, h, w)."""

    @abstractmethod
    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, C, H, W) float of codes (B, D, h, w)."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The ids of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        pixels = images.shape[2] * images.shape[3]
        return torch.cat([
            self.ids(self.latents(some.float() / 127.5 - 1 if self.signed else some.float() / 255))
            for some in _parts(images, pixels)
        ])  # fmt: skip

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=self.codes_per_position)
        pixels = ids.shape[1] * ids.shape[2] * self.stride**2
        return torch.cat([
            self._uint8(self.pictures(self.codes(some))) for some in _parts(ids, pixels)
        ])  # fmt: skip

    def _uint8(self, pictures: Tensor) -> Tensor:
        bright = (pictures + 1) * 127.5 if self.signed else pictures * 255
        return bright.round().clamp(0, 255).to(torch.uint8)

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Refused: it was trained elsewhere."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        raise ConfigError(f"codec {self.name}: loaded from its files, not trained here")

    def config(self) -> dict[str, Any]:
        """The options that the family's function takes back, with the name."""
        return {"name": self.name, "config": self.described}

    def state(self) -> dict[str, Tensor]:
        """The weights, without buffers that nothing reads."""
        return {name: x for name, x in self.state_dict().items() if name not in self.kept}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where a tensor is missing or of another shape."""
        wanted = self.state()
        check_state(wanted, tensors)
        # Taken as they are: the module may have been made without memory.
        own = {name: x.to(wanted[name].dtype) for name, x in tensors.items() if name in wanted}
        self.load_state_dict(own, strict=False, assign=True)

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of buffers that files may hold and nothing here reads."""
        return {}

    def keep(self, name: str) -> None:
        """Have an optional buffer, so that it is loaded and saved again."""
        owner, _, last = name.rpartition(".")
        self.get_submodule(owner).register_buffer(last, torch.empty(self.optional()[name]))
        self.kept.add(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights in the published layout."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG).write_text(json.dumps(self.described, indent=2) + "\n")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, Path(folder) / PUBLISHED_TENSORS, metadata={"format": "pt"})


def _parts(rows: Tensor, pixels: int) -> Iterator[Tensor]:
    """The rows in parts of bounded memory, at least one part."""
    yield from torch.split(rows, max(1, PIXELS_AT_ONCE // max(1, pixels)))


def multipliers(fields: Fields, name: str, *, width: int) -> tuple[int, ...]:
    """The levels' multipliers of the width; every level is a multiple of 32 channels wide."""
    found = fields.described.get(name)
    if (
        not isinstance(found, list)
        or not 1 <= len(found) <= MOST_LEVELS
        or not all(type(m) is int and 1 <= m <= MOST_MULTIPLIER for m in found)
    ):
        raise CheckpointError(
            f"{fields.origin}: {name}={found!r:.80}: expected a list of 1 to {MOST_LEVELS} whole "
            f"numbers, 1 to {MOST_MULTIPLIER}"
        )
    if width % GROUPS:
        raise CheckpointError(f"{fields.origin}: {width} channels: expected a multiple of {GROUPS}")
    return tuple(found)


def nearest_code(latents: Tensor, table: Tensor) -> Tensor:
    """The nearest row of `table` (K, D) to each of `latents` (B, D, h, w): (B, h, w) int64.

    |e|^2 - 2 z.e, in float32, the lowest id of the minimum.
    """
    rows = latents.permute(0, 2, 3, 1).float()
    table = table.float()
    distance = table.square().sum(1) - 2 * rows.flatten(0, 2) @ table.mT
    return distance.argmin(1).view(rows.shape[:3])
