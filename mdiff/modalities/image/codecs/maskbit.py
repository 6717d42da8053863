"""MaskBit's convolutional tokenizer with lookup-free bits (Weber et al. 2024): `ConvVQModel`.

config.json is the yaml's `vq_model` node: model_class "vqgan+", quantizer_type "lookup-free",
token_size bits, hidden_channels, channel_mult, num_res_blocks. Bit i of an id, the lowest
first, is the sign of latent i. What differs from other VQGANs: convolutions padded as
TensorFlow's SAME, none with a bias inside a block, and a block that changes the width adds a
1 x 1 of its own result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mdiff.errors import CheckpointError
from mdiff.files import MOST_WIDTH, Fields
from mdiff.modalities.image.codec import CODES_KEY
from mdiff.modalities.image.codecs.networks.published import (
    MOST_BLOCKS,
    MOST_LEVELS,
    PublishedCodec,
    widths_of,
)
from mdiff.modalities.image.codecs.networks.vqgan import MASKBIT, Names, Shape

# By which its config.json is known.
KEYS = ("quantizer_type", "hidden_channels")
# An id of a position, and of a group of its bits, is to fit in memory as a table.
MOST_BITS = 24


class MaskBit(PublishedCodec):
    """The codec; see `maskbit`. Pixels are 0 to 1 inside."""

    name = "maskbit"
    signed = False

    def __init__(
        self, described: Mapping[str, object], shape: Shape, names: Names, *,
        codes_per_position: int,
    ) -> None:  # fmt: skip
        super().__init__(
            described, shape, codebook_size=1 << shape.latent // codes_per_position,
            codes_per_position=codes_per_position,
        )  # fmt: skip
        self.bits = shape.latent
        self._named(names)

    def ids(self, latents: Tensor) -> Tensor:
        """The signs as ids, groups of bits side by side, each with its lowest bit first."""
        signs = (latents > 0).long().permute(0, 2, 3, 1)
        bits = self.bits // self.codes_per_position
        positive = signs.reshape(*signs.shape[:3], self.codes_per_position, bits)
        power = torch.arange(bits, device=latents.device)
        found: Tensor = (positive << power).sum(4)
        return found[..., 0] if self.codes_per_position == 1 else found

    def codes(self, ids: Tensor) -> Tensor:
        """The signs (B, bits, h, w), -1 or +1, of ids."""
        groups = ids[..., None] if self.codes_per_position == 1 else ids
        power = torch.arange(self.bits // self.codes_per_position, device=ids.device)
        positive = groups[..., None] >> power & 1
        return (2.0 * positive - 1).flatten(3).permute(0, 3, 1, 2)

    def config(self) -> dict[str, object]:
        """The options that `maskbit` takes back, with the name."""
        codes = self.codes_per_position
        return super().config() | ({CODES_KEY: codes} if codes > 1 else {})

    def in_groups(self, codes_per_position: int) -> MaskBit:
        """The same codec with the bits of a position in as many ids; the weights are shared."""
        other = maskbit(config=self.described, codes_per_position=codes_per_position)
        for name in sorted(self.kept):
            other.keep(name)
        other.published.load_state_dict(self.published.state_dict(), assign=True)
        return other

    def optional(self) -> dict[str, tuple[int, ...]]:
        """The tables of bits; a quantiser of signs has nothing to learn."""
        table = (1 << self.bits, self.bits)
        return {"quantize.bits_to_indices": (self.bits,), "quantize.codebook": table}


def maskbit(*, config: Mapping[str, object], codes_per_position: int = 1) -> MaskBit:
    """The codec of a MaskBit tokenizer's config, without its weights.

    A position's ids are `codes_per_position` groups of as many bits, as a generator with
    codebook_splits takes them. The config's codebook_size is not read: published ones are
    wrong where token_size is right. "legacy": true is for files with the older decoder.
    Raises CheckpointError for what is not supported.
    """
    fields = Fields(config)
    fields.choice("model_class", ("vqgan+",), default="vqgan+")
    fields.choice("quantizer_type", ("lookup-free",))
    bits = fields.whole("token_size", most=MOST_BITS)
    codes = codes_per_position
    if type(codes) is not int or not 1 <= codes <= bits or bits % codes:
        raise CheckpointError(f"{bits} bits in {codes!r} groups: expected a divisor of {bits}")
    width = fields.whole("hidden_channels", most=MOST_WIDTH)
    widths = widths_of(fields, "channel_mult", width=width)
    fields.choice("num_resolutions", (len(widths),), default=len(widths))
    blocks = fields.whole("num_res_blocks", most=MOST_BLOCKS)
    after = fields.whole("num_res_blocks_decoder", most=MOST_BLOCKS, default=blocks)
    fields.whole("pixel_size", most=1 << MOST_LEVELS + 6, default=256)
    never = [False] * len(widths)
    shape = Shape(
        channels=fields.whole("num_channels", most=16, default=3), width=width, widths=widths,
        latent=bits, blocks=blocks, decoder_blocks=after, attends=never, decoder_attends=never,
        middle=(blocks, after), middle_attends=False, bias=False, shortcut_of_result=True,
        pools=not fields.flag("sample_with_conv", default=False), last_kernel=1,
    )  # fmt: skip
    names = replace(MASKBIT, fine_first=fields.flag("legacy", default=False))
    return MaskBit(config, shape, names, codes_per_position=codes)
