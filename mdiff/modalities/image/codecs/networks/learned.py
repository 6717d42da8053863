"""What codecs that are trained here share: a convolutional autoencoder around a quantiser."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from mdiff.modalities.image.codec import CODES_KEY, Report, check_pictures
from mdiff.modalities.image.codecs.networks.autoencoder import Decoder, Encoder, check_counts
from mdiff.modalities.image.codecs.networks.coding import NetworkCodec
from mdiff.modalities.image.codecs.networks.fit import Training, fit_networks


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


class LearnedCodec(NetworkCodec):
    """A codec to be fitted; a part writes the quantiser.

    `code_width` numbers of a position's features are one code.
    """

    at_once = 256
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
    def new_quantizer(self) -> nn.Module:
        """What is trained between the networks: (B, n D, h, w) to (the same, ids, loss)."""

    def learn(self, quantizer: nn.Module) -> None:
        """Take over what the trained quantiser has learnt."""

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
