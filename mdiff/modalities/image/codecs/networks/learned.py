"""What codecs that are trained here share: a convolutional autoencoder around a quantiser."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from mdiff.modalities.image.codec import CODES_KEY, Report, check_ids, check_pictures, finite
from mdiff.modalities.image.codecs.networks.autoencoder import (
    CODED_AT_ONCE,
    Decoder,
    Encoder,
    check_counts,
    pixels,
    scaled,
)
from mdiff.modalities.image.codecs.networks.fit import Training, fit_networks, take_state


@dataclass(frozen=True)
class NetworkOptions:
    """The options that `vq` and `bits` have in common; ConfigError for an invalid count."""

    channels: int
    stride: int
    codes_per_position: int
    width: int
    blocks: int
    local: bool
    training: Training

    def __post_init__(self) -> None:
        check_counts(
            channels=self.channels, stride=self.stride, width=self.width, blocks=self.blocks,
            codes_per_position=self.codes_per_position,
        )  # fmt: skip


class LearnedCodec(nn.Module):
    """A codec to be fitted; a part writes the quantiser. Pixels 0 to 255 are -1 to 1 inside.

    `code_width` numbers of a position's features are one code.
    """

    name: str
    lossless = False
    receptive_field_margin: int | None

    def __init__(self, options: NetworkOptions, *, codebook_size: int, code_width: int) -> None:
        super().__init__()
        self.options, self.codebook_size, self.code_width = options, codebook_size, code_width
        self.channels, self.stride = options.channels, options.stride
        self.codes_per_position = options.codes_per_position
        inside = options.codes_per_position * code_width
        self.encoder = Encoder(
            channels=options.channels, width=options.width, stride=options.stride,
            blocks=options.blocks, out=inside, kernel=1 if options.local else 3,
        )  # fmt: skip
        self.decoder = Decoder(
            channels=options.channels, width=options.width, stride=options.stride,
            blocks=options.blocks, inputs=inside,
        )  # fmt: skip
        self.receptive_field_margin = self.encoder.receptive_field_margin

    @abstractmethod
    def ids(self, features: Tensor) -> Tensor:
        """The ids (B, h, w[, n]) int64 of features (B, n D, h, w)."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """The decoder's input (B, n D, h, w) for ids (B, h, w[, n])."""

    @abstractmethod
    def new_quantizer(self) -> nn.Module:
        """What is trained between the networks: (B, n D, h, w) to (the same, ids, loss)."""

    def learn(self, quantizer: nn.Module) -> None:
        """Take over what the trained quantiser has learnt."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The ids (B, h, w[, n]) int64 of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        parts = torch.split(images, CODED_AT_ONCE)
        return torch.cat([self.ids(finite(self.encoder(scaled(some)))) for some in parts])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=self.codes_per_position)
        parts = torch.split(ids, CODED_AT_ONCE)
        return torch.cat([pixels(self.decoder(self.codes(some))) for some in parts])

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Train the networks and the quantiser on pictures (N, C, H, W) uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        made = fit_networks(
            self.encoder, self.new_quantizer, self.decoder, images, plan=self.options.training,
            seed=seed, report=report,
        )  # fmt: skip
        self.learn(made)
        self.eval().requires_grad_(False)
        for tensor in self.state().values():
            self.options.training.check_finite(tensor, f"the {self.options.training.steps} steps")
        return self

    def config(self) -> dict[str, object]:
        """The options that the part's function takes back, with the name."""
        options = self.options
        return {
            "name": self.name, "channels": self.channels, "stride": self.stride,
            CODES_KEY: self.codes_per_position, "width": options.width, "blocks": options.blocks,
            "local": options.local,
        } | options.training.changed()  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """What has been learnt."""
        return dict(self.state_dict())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where a tensor is missing or of another shape."""
        take_state(self, self.state(), tensors)
