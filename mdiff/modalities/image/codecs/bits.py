"""Tokens made of bits or of small scalars, without a codebook to learn: LFQ and FSQ.

LFQ (Yu et al. 2024, "Language model beats diffusion", section 3.1) keeps the signs of the
features; FSQ (Mentzer et al. 2024, equations 1 and 2) rounds each to a few levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mdiff.errors import ConfigError, nearest
from mdiff.modalities.image.codec import CODES_KEY, Report, check_ids, check_pictures
from mdiff.modalities.image.codecs.networks.autoencoder import (
    CODED_AT_ONCE,
    Decoder,
    Encoder,
    check_counts,
    pixels,
    scaled,
)
from mdiff.modalities.image.codecs.networks.fit import Training, fit_networks, take_state

QUANTIZERS = ("lfq", "fsq")
# The entropy loss holds the probability of every code at every position.
MOST_BITS = 16
FSQ_LEVELS = (8, 5, 5, 5)


class Bits(nn.Module):
    """The codec; see `bits`. Pixels 0 to 255 are -1 to 1 inside."""

    name = "bits"
    lossless = False

    def __init__(
        self, *, quantizer: str, channels: int, stride: int, levels: tuple[int, ...],
        codes_per_position: int, entropy: float, width: int, blocks: int, local: bool,
        training: Training,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind, self.channels, self.stride = quantizer, channels, stride
        self.levels, self.codes_per_position, self.entropy = levels, codes_per_position, entropy
        self.width, self.blocks, self.local, self.training_plan = width, blocks, local, training
        self.codebook_size = math.prod(levels)
        inside = codes_per_position * len(levels)
        encoder = Encoder(
            channels=channels, width=width, stride=stride, blocks=blocks, out=inside,
            kernel=1 if local else 3,
        )  # fmt: skip
        decoder = Decoder(
            channels=channels, width=width, stride=stride, blocks=blocks, inputs=inside
        )
        # What is learnt; the quantiser has nothing to learn and is made from the options.
        self.networks = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
        self.quantizer = self._quantizer()
        self.receptive_field_margin = encoder.receptive_field_margin
        self.eval().requires_grad_(False)

    def _quantizer(self) -> Quantizer:
        """The quantiser of the library, the codes of a position side by side."""
        from vector_quantize_pytorch import FSQ, LFQ

        if self.kind == "lfq":
            inner: Any = LFQ(
                codebook_size=self.codebook_size, num_codebooks=self.codes_per_position,
                entropy_loss_weight=self.entropy,
                commitment_loss_weight=self.training_plan.commitment,
            )  # fmt: skip
        else:
            inner = FSQ(levels=list(self.levels), num_codebooks=self.codes_per_position)
        return Quantizer(inner)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The ids, (B, h, w) or (B, h, w, n) int64, of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        return torch.cat([
            self.quantizer(self.networks["encoder"](scaled(some)))[1].long()
            for some in torch.split(images, CODED_AT_ONCE)
        ])  # fmt: skip

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=self.codes_per_position)
        return torch.cat([
            pixels(self.networks["decoder"](self.quantizer.inner.indices_to_codes(some)))
            for some in torch.split(ids, CODED_AT_ONCE)
        ])  # fmt: skip

    def bit_matrix(self) -> Tensor:
        """The code of each id of a group, (K, D) float32, for a generator without a table.

        LFQ: D bits, -1 or +1, the most significant first. FSQ: D levels from -1 to 1, the
        first of which varies fastest with the id.
        """
        inner = self.quantizer.inner
        codes = inner.codebook if self.kind == "lfq" else inner.implicit_codebook
        return codes.float().clone()  # type: ignore[no-any-return]

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Train encoder and decoder on pictures (N, C, H, W) uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        fit_networks(
            self.networks["encoder"], self._quantizer, self.networks["decoder"], images,
            plan=self.training_plan, seed=seed, report=report,
        )  # fmt: skip
        self.eval().requires_grad_(False)
        return self

    def config(self) -> dict[str, Any]:
        """The options that `bits` takes back, with the name."""
        by_kind: dict[str, Any] = (
            {"bits": self.codes_per_position * len(self.levels), "entropy": self.entropy}
            if self.kind == "lfq"
            else {"levels": list(self.levels)}
        )
        return {
            "name": self.name, "quantizer": self.kind, "channels": self.channels,
            "stride": self.stride, CODES_KEY: self.codes_per_position, "width": self.width,
            "blocks": self.blocks, "local": self.local,
        } | by_kind | self.training_plan.changed()  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """The weights of encoder and decoder."""
        return dict(self.networks.state_dict())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where a tensor is missing or of another shape."""
        take_state(self.networks, tensors)


class Quantizer(nn.Module):
    """The library's LFQ or FSQ in float32, with a loss that is 0 for FSQ."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, n D, h, w) to (codes alike, ids (B, h, w[, n]), loss)."""
        # The library keeps autocast away on CUDA alone; elsewhere its entropy would be bfloat16.
        with torch.autocast(features.device.type, enabled=False):
            rows = features.float().permute(0, 2, 3, 1)
            codes, ids, *loss = self.inner(rows.flatten(0, 2)[None])
        codes = codes.view(rows.shape).permute(0, 3, 1, 2)
        ids = ids[0].view(*rows.shape[:3], *ids.shape[2:])
        return codes, ids, loss[0] if loss else features.new_zeros(())


def bits(
    *,
    quantizer: str = "lfq",
    channels: int = 3,
    stride: int = 4,
    bits: int | None = None,
    levels: Sequence[int] | None = None,
    codes_per_position: int = 1,
    entropy: float = 0.1,
    width: int = 32,
    blocks: int = 1,
    local: bool = False,
    **training: Any,
) -> Bits:
    """A codec of bits, to be fitted; the networks are those of `vq`.

    "lfq": a position has `bits` bits (10) in n = `codes_per_position` codes of as many each, so
    that the codebook has 2^(bits / n) ids, highest bit first; `entropy` weighs the loss that makes
    each code certain and all codes frequent. "fsq": each code has one scalar for each number in
    `levels` (8, 5, 5, 5), and their product of ids. `training` are the numbers of
    `Training`. Raises ConfigError for what cannot be meant.
    """
    if quantizer not in QUANTIZERS:
        raise ConfigError(f"codec.quantizer={quantizer!r}; {nearest(str(quantizer), QUANTIZERS)}")
    check_counts(
        channels=channels, stride=stride, codes_per_position=codes_per_position, width=width,
        blocks=blocks,
    )  # fmt: skip
    if isinstance(entropy, bool) or not isinstance(entropy, int | float) or not entropy >= 0:
        raise ConfigError(f"codec.entropy={entropy!r}: expected 0 or a positive number")
    if quantizer == "lfq":
        if levels is not None:
            raise ConfigError("codec.levels is for quantizer: fsq; lfq takes bits")
        scalars = (2,) * _bits_of_a_code(10 if bits is None else bits, codes_per_position)
    else:
        if bits is not None:
            raise ConfigError("codec.bits is for quantizer: lfq; fsq takes levels")
        scalars = _fsq_levels(FSQ_LEVELS if levels is None else levels)
    return Bits(
        quantizer=quantizer, channels=channels, stride=stride, levels=scalars,
        codes_per_position=codes_per_position, entropy=entropy, width=width, blocks=blocks,
        local=local, training=Training.of(training),
    )  # fmt: skip


def _bits_of_a_code(bits: int, codes: int) -> int:
    if type(bits) is not int or bits < 1 or bits % codes or bits // codes > MOST_BITS:
        raise ConfigError(
            f"codec.bits={bits!r} in {codes} codes: expected a multiple of codes_per_position with "
            f"at most {MOST_BITS} bits a code"
        )
    return bits // codes


def _fsq_levels(levels: Sequence[int]) -> tuple[int, ...]:
    whole = isinstance(levels, list | tuple) and all(type(n) is int and n >= 3 for n in levels)
    if not whole or not levels or math.prod(levels) > 2**MOST_BITS:
        raise ConfigError(
            f"codec.levels={levels!r}: expected whole numbers of at least 3, such as [8, 5, 5, 5], "
            f"with a product of at most {2**MOST_BITS}"
        )
    return tuple(levels)
