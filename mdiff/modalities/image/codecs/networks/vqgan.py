"""The encoder and decoder of a VQGAN as its published checkpoints name their parts.

Esser et al. 2021, table 7, and LlamaGen (Sun et al. 2024), which renames and reorders the same
blocks: `Layout` says how.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
EPSILON = 1e-6


@dataclass(frozen=True)
class Layout:
    """Names of the parts, and whether the decoder's levels are stored coarse ones first."""

    down: str
    up: str
    block: str
    middle: tuple[str, str, str]
    coarse_first: bool


TAMING = Layout("down", "up", "block", ("block_1", "attn_1", "block_2"), coarse_first=False)
LLAMAGEN = Layout("conv_blocks", "conv_blocks", "res", ("0", "1", "2"), coarse_first=True)


@dataclass(frozen=True)
class Shape:
    """Widths are `width` times the level's multiplier, fine levels first."""

    channels: int
    width: int
    multipliers: tuple[int, ...]
    blocks: int
    attends: tuple[bool, ...]
    latent: int

    @property
    def deepest(self) -> int:
        """Channels of the coarsest level."""
        return self.width * self.multipliers[-1]


def norm(width: int) -> nn.GroupNorm:
    """The norm of all blocks; the width is a multiple of 32."""
    return nn.GroupNorm(GROUPS, width, eps=EPSILON)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm x))))), x through a 1 x 1 where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)
        self.widens = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        sum_: Tensor = (self.nin_shortcut(x) if self.widens else x) + h
        return sum_


class Attention(nn.Module):
    """x + one head of attention over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of `x` (B, C, H, W)."""
        h = self.norm(x)
        query, key, value = (each(h).flatten(2).mT for each in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value)
        sum_: Tensor = x + self.proj_out(mixed.mT.reshape(x.shape))
        return sum_


class Downsample(nn.Module):
    """Half the sides; the convolution is padded on the right and below alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H / 2, W / 2)."""
        half: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return half


class Upsample(nn.Module):
    """Twice the sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, 2 H, 2 W)."""
        double: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return double


class Level(nn.Module):
    """The blocks of one resolution, attention after each where it attends, then a resampling."""

    def __init__(
        self, inputs: int, outputs: int, *, blocks: int, attends: bool, named: str,
        resample: nn.Module | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.named = named
        widths = [inputs] + [outputs] * (blocks - 1)
        self.add_module(named, nn.ModuleList(ResidualBlock(width, outputs) for width in widths))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attends else 0))
        if resample is not None:
            self.add_module("downsample" if isinstance(resample, Downsample) else "upsample",
                            resample)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        for number, block in enumerate(self.get_submodule(self.named).children()):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        for name in ("downsample", "upsample"):
            if name in self._modules:
                x = self.get_submodule(name)(x)
        return x


def middle(width: int, names: Sequence[str]) -> nn.Sequential:
    """A block, attention and a block."""
    parts = (ResidualBlock(width, width), Attention(width), ResidualBlock(width, width))
    return nn.Sequential(OrderedDict(zip(names, parts)))


class Encoder(nn.Module):
    """Pictures (B, C, H, W) float to (B, latent, h, w)."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__()
        self.named = layout.down
        self.conv_in = nn.Conv2d(shape.channels, shape.width, 3, padding=1)
        levels, inputs = nn.ModuleList(), shape.width
        for number, multiplier in enumerate(shape.multipliers):
            outputs = shape.width * multiplier
            last = number == len(shape.multipliers) - 1
            levels.append(Level(
                inputs, outputs, blocks=shape.blocks, attends=shape.attends[number],
                named=layout.block, resample=None if last else Downsample(outputs),
            ))  # fmt: skip
            inputs = outputs
        self.add_module(layout.down, levels)
        self.mid = middle(inputs, layout.middle)
        self.norm_out = norm(inputs)
        self.conv_out = nn.Conv2d(inputs, shape.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """The features."""
        x = self.conv_in(x)
        for level in self.get_submodule(self.named).children():
            x = level(x)
        features: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return features


class Decoder(nn.Module):
    """(B, latent, h, w) to pictures (B, C, H, W) float; one block more a level than the encoder."""

    def __init__(self, shape: Shape, layout: Layout) -> None:
        super().__init__()
        self.named, self.coarse_first = layout.up, layout.coarse_first
        inputs = shape.deepest
        self.conv_in = nn.Conv2d(shape.latent, inputs, 3, padding=1)
        self.mid = middle(inputs, layout.middle)
        levels: list[nn.Module] = []
        for number, multiplier in reversed(list(enumerate(shape.multipliers))):
            outputs = shape.width * multiplier
            levels.append(Level(
                inputs, outputs, blocks=shape.blocks + 1, attends=shape.attends[number],
                named=layout.block, resample=Upsample(outputs) if number else None,
            ))  # fmt: skip
            inputs = outputs
        self.add_module(layout.up, nn.ModuleList(self._stored(levels)))
        self.norm_out = norm(inputs)
        self.conv_out = nn.Conv2d(inputs, shape.channels, 3, padding=1)

    def _stored(self, levels: Sequence[nn.Module]) -> list[nn.Module]:
        """Coarse levels first as the files have them, and back."""
        return list(levels) if self.coarse_first else list(reversed(levels))

    def forward(self, x: Tensor) -> Tensor:
        """The pictures."""
        x = self.mid(self.conv_in(x))
        for level in self._stored(list(self.get_submodule(self.named).children())):
            x = level(x)
        pictures: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return pictures
