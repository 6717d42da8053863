"""The layers of aMUSEd's U-ViT (Patil et al. 2024), named as in the published files.

Grids are (B, h, w, C), lines of positions (B, L, C); a 1 x 1 convolution is a map of each position.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, attention
from mdiff.backbones.layers.modules import Matrix, RootNorm
from mdiff.kernels.dense import linear

# The epsilons that no config entry sets.
RESPONSE_EPSILON, BLOCK_EPSILON = 1e-6, 1e-6
# How much wider a convolutional block is inside (Liu et al. 2022).
WIDENING = 4
SLOWEST = 10_000


class Parts(NamedTuple):
    """What the matrices and the norms of a model have: biases, epsilon, weights."""

    bias: bool
    epsilon: float
    affine: bool

    def matrix(self, inputs: int, outputs: int) -> Matrix:
        """One with a bias or without."""
        return Matrix(inputs, outputs, bias=self.bias)

    def pointwise(self, inputs: int, outputs: int) -> nn.Module:
        """A 1 x 1 convolution."""
        return PointwiseConv(inputs, outputs, 1, bias=self.bias)

    def norm(self, size: int) -> RootNorm:
        """One of its options."""
        return RootNorm(size, self.epsilon, affine=self.affine)


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution, as the map of each position that it is."""

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        mapped = linear(x, self.weight.flatten(1))
        return mapped if self.bias is None else mapped + self.bias


class AdaptiveNorm(nn.Module):
    """(1 + scale) norm(x) + shift, scale and shift read from the condition."""

    def __init__(self, size: int, norm: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.linear = parts.matrix(size, 2 * size)
        self.norm = norm

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` (B, L, size) adapted to the condition (B, size)."""
        scale, shift = self.linear(F.silu(condition))[:, None].chunk(2, -1)
        adapted: Tensor = self.norm(x) * (1 + scale) + shift
        return adapted


class Attention(nn.Module):
    """Multi-head attention of (B, L, width) to (B, S, width)."""

    def __init__(self, width: int, heads: int, parts: Parts) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (parts.matrix(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([parts.matrix(width, width)])

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """The attention output (B, L, width) of `x` over all `states`."""
        three = (self.to_q(x), self.to_k(states), self.to_v(states))
        query, key, value = (each.unflatten(-1, (self.heads, -1)) for each in three)
        result: Tensor = self.to_out[0](attention(query, key, value, Context()))
        return result


class _Gate(nn.Module):
    """value * gelu(gate), both one map of x (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, parts: Parts) -> None:
        super().__init__()
        self.proj = parts.matrix(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class TransformerLayer(nn.Module):
    """Attention to itself, to the states, and a gated layer, each behind an adaptive norm."""

    def __init__(self, width: int, heads: int, inner: int, parts: Parts) -> None:
        super().__init__()
        self.norm1 = AdaptiveNorm(width, parts.norm(width), parts)
        self.attn1 = Attention(width, heads, parts)
        self.norm2 = AdaptiveNorm(width, parts.norm(width), parts)
        self.attn2 = Attention(width, heads, parts)
        # The third norm alone takes the mean off.
        centred = nn.LayerNorm(width, parts.epsilon, parts.affine, parts.bias)
        self.norm3 = AdaptiveNorm(width, centred, parts)
        # The files leave number 1 empty, for dropout.
        gate = _Gate(width, inner, parts)
        net = nn.Sequential(gate, nn.Identity(), parts.matrix(inner, width))
        self.ff = nn.ModuleDict({"net": net})

    def forward(self, x: Tensor, states: Tensor, condition: Tensor) -> Tensor:
        """The stream `x` (B, L, width) after this layer; `states` (B, S, width)."""
        h = self.norm1(x, condition)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x, condition), states)
        result: Tensor = x + self.ff["net"](self.norm3(x, condition))
        return result


class ResponseNorm(nn.Module):
    """Global response normalisation over a sample's positions (Woo et al. 2023, ConvNeXt V2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, size))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised grid `x` (B, h, w, size)."""
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        share = response / (response.mean(-1, keepdim=True) + RESPONSE_EPSILON)
        normal: Tensor = self.gamma * (x * share) + self.beta + x
        return normal


class ConvBlock(nn.Module):
    """A ConvNeXt block, then shifted and scaled by the condition (B, `conditions`)."""

    def __init__(self, width: int, conditions: int, parts: Parts) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=parts.bias)
        self.norm = parts.norm(width)
        self.channelwise_linear_1 = parts.matrix(width, WIDENING * width)
        self.channelwise_norm = ResponseNorm(WIDENING * width)
        self.channelwise_linear_2 = parts.matrix(WIDENING * width, width)
        self.cond_embeds_mapper = parts.matrix(conditions, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width) after this block."""
        h = self.norm(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        h = self.channelwise_norm(F.gelu(self.channelwise_linear_1(h)))
        x = x + self.channelwise_linear_2(h)
        scale, shift = self.cond_embeds_mapper(F.silu(condition))[:, None, None].chunk(2, -1)
        adapted: Tensor = x * (1 + scale) + shift
        return adapted


class CrossBlock(nn.Module):
    """Twice attention to the states, which are mapped to this width where they have another."""

    def __init__(self, width: int, heads: int, conditions: int, parts: Parts) -> None:
        super().__init__()
        mapped = conditions != width
        self.kv_mapper = parts.matrix(conditions, width) if mapped else None
        self.norm1 = RootNorm(width, BLOCK_EPSILON)
        self.attn1 = Attention(width, heads, parts)
        self.norm2 = RootNorm(width, BLOCK_EPSILON)
        self.attn2 = Attention(width, heads, parts)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """The stream `x` (B, L, width) after this block; `states` (B, S, `conditions`)."""
        if self.kv_mapper is not None:
            states = self.kv_mapper(F.silu(states))
        x = x + self.attn1(self.norm1(x), states)
        result: Tensor = x + self.attn2(self.norm2(x), states)
        return result


class Resize(nn.Module):
    """A norm, then a convolution of 2 x 2: halves the sides of a grid, or doubles them."""

    def __init__(self, width: int, parts: Parts, *, halves: bool) -> None:
        super().__init__()
        self.norm = parts.norm(width)
        kind = nn.Conv2d if halves else nn.ConvTranspose2d
        self.conv = kind(width, width, 2, stride=2, bias=parts.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width) at the other size."""
        resized: Tensor = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return resized


class GridBlock(nn.Module):
    """Pairs of a ConvNeXt block and attention to the states, on the grid.

    `halves` a grid before them or `doubles` it after them; both states and condition are
    `conditions` wide.
    """

    def __init__(
        self, width: int, parts: Parts, *, depth: int, heads: int, conditions: int, halves: bool,
        doubles: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.downsample = Resize(width, parts, halves=True) if halves else None
        self.res_blocks = nn.ModuleList(ConvBlock(width, conditions, parts) for _ in range(depth))
        self.attention_blocks = nn.ModuleList(
            CrossBlock(width, heads, conditions, parts) for _ in range(depth)
        )
        self.upsample = Resize(width, parts, halves=False) if doubles else None

    def forward(self, x: Tensor, states: Tensor, condition: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width); `states` (B, S, C), `condition` (B, C)."""
        x = x if self.downsample is None else self.downsample(x)
        for block, cross in zip(self.res_blocks, self.attention_blocks):
            x = block(x, condition)
            x = cross(x.flatten(1, 2), states).view(x.shape)
        return x if self.upsample is None else self.upsample(x)


def chain(**modules: nn.Module) -> nn.Sequential:
    """The modules one after another, under these names."""
    return nn.Sequential(OrderedDict(modules))


def waves(numbers: Tensor, size: int) -> Tensor:
    """The cos and sin (..., size) float32 of numbers (...) at frequencies from 1 to 1 / 10,000.

    The frequencies are rounded as they were in training: numbers are hundreds of pixels.
    """
    index = torch.arange(size // 2, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[..., None] * (-math.log(SLOWEST) * index / (size // 2)).exp()
    return torch.cat([angles.cos(), angles.sin()], -1)
