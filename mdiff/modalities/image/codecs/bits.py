"""Tokens made of bits or of small scalars, without a codebook to learn: LFQ and FSQ.

LFQ (Yu et al. 2024, "Language model beats diffusion", section 3.1) keeps the signs of the
features; FSQ (Mentzer et al. 2024, equations 1 and 2) rounds each to a few levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.errors import ConfigError, nearest
from mdiff.modalities.image.codecs.networks.fit import Training
from mdiff.modalities.image.codecs.networks.learned import LearnedCodec, NetworkOptions

QUANTIZERS = ("lfq", "fsq")
# The entropy loss holds the probability of every code at every position.
MOST_BITS = 16
FSQ_LEVELS = (8, 5, 5, 5)


class Bits(LearnedCodec):
    """The codec; see `bits`. `levels` are how many values each scalar of a code has."""

    name = "bits"

    def __init__(
        self, options: NetworkOptions, *, quantizer: str, levels: tuple[int, ...], entropy: float
    ) -> None:
        super().__init__(options, codebook_size=math.prod(levels), code_width=len(levels))
        self.kind, self.levels, self.entropy = quantizer, levels, entropy
        self.quantizer = self.new_quantizer()
        self.eval().requires_grad_(False)

    def new_quantizer(self) -> Quantizer:
        """The quantiser of the library, the codes of a position side by side."""
        from vector_quantize_pytorch import FSQ, LFQ

        codes = self.codes_per_position
        if self.kind == "fsq":
            return Quantizer(FSQ(levels=list(self.levels), num_codebooks=codes))
        return Quantizer(
            LFQ(
                codebook_size=self.codebook_size, num_codebooks=codes,
                entropy_loss_weight=self.entropy,
                commitment_loss_weight=self.options.training.commitment,
            )
        )  # fmt: skip

    def ids(self, features: Tensor) -> Tensor:
        """The ids (B, h, w[, n]) int64 of features (B, n D, h, w)."""
        ids: Tensor = self.quantizer(features)[1]
        return ids.long()

    def codes(self, ids: Tensor) -> Tensor:
        """The codes (B, n D, h, w) of ids."""
        codes: Tensor = self.quantizer.inner.indices_to_codes(ids)
        return codes

    def config(self) -> dict[str, object]:
        """The options that `bits` takes back, with the name."""
        if self.kind == "fsq":
            own: dict[str, object] = {"levels": list(self.levels)}
        else:
            own = {"bits": self.codes_per_position * len(self.levels), "entropy": self.entropy}
        return super().config() | {"quantizer": self.kind} | own

    def state(self) -> dict[str, Tensor]:
        """The weights of encoder and decoder; the quantiser is made from the options."""
        return {n: x for n, x in self.state_dict().items() if not n.startswith("quantizer.")}


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
    **training: float,
) -> Bits:
    """A codec of bits, to be fitted; the networks are those of `vq`.

    "lfq": a position has `bits` bits (10) in n = `codes_per_position` codes of as many each, so
    that the codebook has 2^(bits / n) ids, highest bit first; `entropy` weighs the loss that makes
    each code certain and all codes frequent. "fsq": each code has one scalar for each number in
    `levels` (8, 5, 5, 5), and their product of ids. `training` are the numbers of
    `Training`. Raises ConfigError for invalid options.
    """
    if quantizer not in QUANTIZERS:
        raise ConfigError(f"codec.quantizer={quantizer!r}; {nearest(str(quantizer), QUANTIZERS)}")
    options = NetworkOptions(
        channels=channels, stride=stride, codes_per_position=codes_per_position, width=width,
        blocks=blocks, local=local, training=Training.of(training),
    )  # fmt: skip
    if (
        isinstance(entropy, bool)
        or not isinstance(entropy, int | float)
        or not 0 <= entropy < math.inf
    ):
        raise ConfigError(f"codec.entropy={entropy!r}: expected 0 or a positive number")
    if quantizer == "lfq":
        if levels is not None:
            raise ConfigError("codec.levels is for quantizer: fsq; lfq takes bits")
        scalars = (2,) * _bits_of_a_code(10 if bits is None else bits, codes_per_position)
    else:
        if bits is not None:
            raise ConfigError("codec.bits is for quantizer: lfq; fsq takes levels")
        scalars = _fsq_levels(FSQ_LEVELS if levels is None else levels)
    return Bits(options, quantizer=quantizer, levels=scalars, entropy=entropy)


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
