"""MaskBit's convolutional tokenizer with lookup-free bits (Weber et al. 2024): `ConvVQModel`.

config.json is the yaml's `vq_model` node: model_class "vqgan+", quantizer_type "lookup-free",
token_size bits, hidden_channels, channel_mult, num_res_blocks. Bit i of an id, the lowest
first, is the sign of latent i. What differs from other VQGANs: convolutions padded as
TensorFlow's SAME, none with a bias inside a block, and a block that changes the width adds a
1 x 1 of its own result.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.errors import CheckpointError
from mdiff.files import MOST_WIDTH, Fields
from mdiff.modalities.image.codec import CODES_KEY
from mdiff.modalities.image.codecs.networks.published import (
    MOST_BLOCKS,
    MOST_LEVELS,
    PublishedCodec,
    multipliers,
)
from mdiff.modalities.image.codecs.networks.vqgan import norm

# An id of a position, and of a group of its bits, is to fit in memory as a table.
MOST_BITS = 24


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))) = x + h; h + W h where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.widens = inputs != outputs
        if self.widens:
            self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        sum_: Tensor = h + (self.nin_shortcut(h) if self.widens else x)
        return sum_


class Stage(nn.Module):
    """The blocks of one resolution, and half the sides or twice the sides after them."""

    def __init__(
        self, inputs: int, outputs: int, *, blocks: int, halves: bool = False,
        doubles: bool = False, by_convolution: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.halves, self.doubles, self.by_convolution = halves, doubles, by_convolution
        widths = [inputs] + [outputs] * (blocks - 1)
        self.res_blocks = nn.ModuleList(Block(width, outputs) for width in widths)
        if halves and by_convolution:
            self.down_conv = nn.Conv2d(outputs, outputs, 3, stride=2)
        if doubles:
            self.upsample_conv = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        for block in self.res_blocks:
            x = block(x)
        if self.halves and not self.by_convolution:
            return F.avg_pool2d(x, 2)
        if self.halves:
            # SAME padding of even sides: one row below, one column on the right.
            x = self.down_conv(F.pad(x, (0, 1, 0, 1)))
        if self.doubles:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Pictures (B, C, H, W) to latents (B, bits, h, w)."""

    def __init__(
        self, channels: int, widths: list[int], bits: int, *, blocks: int, by_convolution: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        last = len(widths) - 2
        self.down = nn.ModuleList(
            Stage(inputs, outputs, blocks=blocks, halves=number < last,
                  by_convolution=by_convolution)
            for number, (inputs, outputs) in enumerate(pairwise(widths))
        )  # fmt: skip
        self.mid = Stage(widths[-1], widths[-1], blocks=blocks)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The latents."""
        x = self.conv_in(x)
        for stage in self.down:
            x = stage(x)
        found: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return found


class Decoder(nn.Module):
    """Codes (B, bits, h, w) to pictures; `fine_first` is the order of older files."""

    def __init__(
        self, channels: int, widths: list[int], bits: int, *, blocks: int, fine_first: bool
    ) -> None:
        super().__init__()
        self.fine_first = fine_first
        self.conv_in = nn.Conv2d(bits, widths[-1], 3, padding=1)
        self.mid = Stage(widths[-1], widths[-1], blocks=blocks)
        # Level i takes what the next coarser one gives; the coarsest keeps its width.
        below = [*widths[2:], widths[-1]]
        stages = [
            Stage(inputs, outputs, blocks=blocks, doubles=number > 0)
            for number, (inputs, outputs) in enumerate(zip(below, widths[1:]))
        ]
        self.up = nn.ModuleList(stages if fine_first else reversed(stages))
        self.norm_out = norm(widths[1])
        self.conv_out = nn.Conv2d(widths[1], channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The pictures."""
        x = self.mid(self.conv_in(x))
        stages = list(self.up)
        for stage in reversed(stages) if self.fine_first else stages:
            x = stage(x)
        pictures: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return pictures


class MaskBit(PublishedCodec):
    """The codec; see `maskbit`. Pixels are 0 to 1 inside."""

    name = "maskbit"
    signed = False

    def __init__(
        self, described: Mapping[str, Any], *, channels: int, widths: list[int], bits: int,
        codes_per_position: int, blocks: tuple[int, int], by_convolution: bool, fine_first: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            described, stride=1 << len(widths) - 2, codebook_size=1 << bits // codes_per_position,
            channels=channels,
        )  # fmt: skip
        self.bits, self.codes_per_position = bits, codes_per_position
        self.encoder = Encoder(
            channels, widths, bits, blocks=blocks[0], by_convolution=by_convolution
        )
        self.decoder = Decoder(channels, widths, bits, blocks=blocks[1], fine_first=fine_first)
        # Holds what older files name there; a quantiser of signs has nothing to learn.
        self.quantize = nn.Module()
        self.eval().requires_grad_(False)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [0, 1] to (B, bits, h, w)."""
        found: Tensor = self.encoder(pictures)
        return found

    def ids(self, latents: Tensor) -> Tensor:
        """The signs as ids, groups of bits side by side, each with its lowest bit first."""
        signs = (latents > 0).long().permute(0, 2, 3, 1)
        positive = signs.unflatten(3, (self.codes_per_position, -1))
        power = torch.arange(positive.shape[4], device=latents.device)
        found: Tensor = (positive << power).sum(4)
        return found[..., 0] if self.codes_per_position == 1 else found

    def codes(self, ids: Tensor) -> Tensor:
        """The signs (B, bits, h, w), -1 or +1, of ids."""
        groups = ids[..., None] if self.codes_per_position == 1 else ids
        power = torch.arange(self.bits // self.codes_per_position, device=ids.device)
        positive = groups[..., None] >> power & 1
        return (2.0 * positive - 1).flatten(3).permute(0, 3, 1, 2)

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, C, H, W) around [0, 1]."""
        made: Tensor = self.decoder(codes)
        return made

    def config(self) -> dict[str, Any]:
        """The options that `maskbit` takes back, with the name."""
        codes = self.codes_per_position
        return super().config() | ({CODES_KEY: codes} if codes > 1 else {})

    def in_groups(self, codes_per_position: int) -> MaskBit:
        """The same codec with the bits of a position in as many ids; the weights are shared."""
        other = maskbit(config=self.described, codes_per_position=codes_per_position)
        for name in sorted(self.kept):
            other.keep(name)
        other.load_state_dict(self.state_dict(), assign=True)
        return other

    def optional(self) -> dict[str, tuple[int, ...]]:
        """The tables of bits."""
        table = (1 << self.bits, self.bits)
        return {"quantize.bits_to_indices": (self.bits,), "quantize.codebook": table}


def recognises(described: Mapping[str, Any]) -> bool:
    """Whether this is the `vq_model` node of MaskBit."""
    return "quantizer_type" in described and "hidden_channels" in described


def maskbit(*, config: Mapping[str, Any], codes_per_position: int = 1) -> MaskBit:
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
    levels = multipliers(fields, "channel_mult", width=width)
    fields.choice("num_resolutions", (len(levels),), default=len(levels))
    blocks = fields.whole("num_res_blocks", most=MOST_BLOCKS)
    after = fields.whole("num_res_blocks_decoder", most=MOST_BLOCKS, default=blocks)
    fields.whole("pixel_size", most=1 << MOST_LEVELS + 6, default=256)
    return MaskBit(
        config, channels=fields.whole("num_channels", most=16, default=3),
        widths=[width, *(width * level for level in levels)], bits=bits,
        codes_per_position=codes, blocks=(blocks, after),
        by_convolution=fields.flag("sample_with_conv", default=False),
        fine_first=fields.flag("legacy", default=False),
    )  # fmt: skip
