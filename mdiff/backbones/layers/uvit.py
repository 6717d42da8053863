"""The layers of aMUSEd's U-ViT (Patil et al. 2024), named as in the published files.

Grids are (B, h, w, C), lines of positions (B, L, C); a 1 x 1 convolution is a map of each position.
"""

import math
from typing import TypedDict, Unpack

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


class NormOptions(TypedDict):
    """The options of every norm of a model."""

    epsilon: float
    affine: bool


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution, as the map of each position that it is."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        mapped = linear(x, self.weight.flatten(1))
        return mapped if self.bias is None else mapped + self.bias


class AdaptiveNorm(nn.Module):
    """(1 + scale) norm(x) + shift, scale and shift read from the condition."""

    def __init__(self, size: int, norm: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.linear = Matrix(size, 2 * size, bias=bias)
        self.norm = norm

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """`x` (B, L, size) adapted to the condition (B, size)."""
        scale, shift = self.linear(F.silu(condition))[:, None].chunk(2, -1)
        adapted: Tensor = self.norm(x) * (1 + scale) + shift
        return adapted


class Attention(nn.Module):
    """Multi-head attention of (B, L, width) to (B, S, width)."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Matrix(width, width, bias=bias)
        self.to_k = Matrix(width, width, bias=bias)
        self.to_v = Matrix(width, width, bias=bias)
        self.to_out = nn.ModuleList([Matrix(width, width, bias=bias)])

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """The attention output (B, L, width) of `x` over all `states`."""
        query, key, value = (
            each.unflatten(-1, (self.heads, -1))
            for each in (self.to_q(x), self.to_k(states), self.to_v(states))
        )
        result: Tensor = self.to_out[0](attention(query, key, value, Context()))
        return result


class _Gate(nn.Module):
    """value * gelu(gate), both one map of x (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = Matrix(width, 2 * inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class TransformerLayer(nn.Module):
    """Attention to itself, to the states, and a gated layer, each behind an adaptive norm."""

    def __init__(
        self, width: int, heads: int, inner: int, *, bias: bool, **norm: Unpack[NormOptions]
    ) -> None:
        super().__init__()
        root = [RootNorm(width, **norm) for _ in range(2)]
        self.norm1 = AdaptiveNorm(width, root[0], bias=bias)
        self.attn1 = Attention(width, heads, bias=bias)
        self.norm2 = AdaptiveNorm(width, root[1], bias=bias)
        self.attn2 = Attention(width, heads, bias=bias)
        # The third norm alone takes the mean off.
        centred = nn.LayerNorm(width, norm["epsilon"], norm["affine"], bias)
        self.norm3 = AdaptiveNorm(width, centred, bias=bias)
        # The files leave number 1 empty, for dropout.
        gate = _Gate(width, inner, bias=bias)
        net = nn.Sequential(gate, nn.Identity(), Matrix(inner, width, bias=bias))
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

    def __init__(
        self, width: int, conditions: int, *, bias: bool, **norm: Unpack[NormOptions]
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=bias)
        self.norm = RootNorm(width, **norm)
        self.channelwise_linear_1 = Matrix(width, WIDENING * width, bias=bias)
        self.channelwise_norm = ResponseNorm(WIDENING * width)
        self.channelwise_linear_2 = Matrix(WIDENING * width, width, bias=bias)
        self.cond_embeds_mapper = Matrix(conditions, 2 * width, bias=bias)

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

    def __init__(self, width: int, heads: int, conditions: int, *, bias: bool) -> None:
        super().__init__()
        mapped = conditions != width
        self.kv_mapper = Matrix(conditions, width, bias=bias) if mapped else None
        self.norm1 = RootNorm(width, BLOCK_EPSILON)
        self.attn1 = Attention(width, heads, bias=bias)
        self.norm2 = RootNorm(width, BLOCK_EPSILON)
        self.attn2 = Attention(width, heads, bias=bias)

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        """The stream `x` (B, L, width) after this block; `states` (B, S, `conditions`)."""
        if self.kv_mapper is not None:
            states = self.kv_mapper(F.silu(states))
        x = x + self.attn1(self.norm1(x), states)
        result: Tensor = x + self.attn2(self.norm2(x), states)
        return result


class Resize(nn.Module):
    """A norm, then a convolution of 2 x 2: halves the sides of a grid, or doubles them."""

    def __init__(
        self, width: int, *, halves: bool, bias: bool, **norm: Unpack[NormOptions]
    ) -> None:
        super().__init__()
        self.norm = RootNorm(width, **norm)
        kind = nn.Conv2d if halves else nn.ConvTranspose2d
        self.conv = kind(width, width, 2, stride=2, bias=bias)

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
        self, width: int, *, depth: int, heads: int, conditions: int, halves: bool, doubles: bool,
        bias: bool, **norm: Unpack[NormOptions],
    ) -> None:  # fmt: skip
        super().__init__()
        self.downsample = Resize(width, halves=True, bias=bias, **norm) if halves else None
        self.res_blocks = nn.ModuleList(
            ConvBlock(width, conditions, bias=bias, **norm) for _ in range(depth)
        )
        self.attention_blocks = nn.ModuleList(
            CrossBlock(width, heads, conditions, bias=bias) for _ in range(depth)
        )
        self.upsample = Resize(width, halves=False, bias=bias, **norm) if doubles else None

    def forward(self, x: Tensor, states: Tensor, condition: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width); `states` (B, S, C), `condition` (B, C)."""
        x = x if self.downsample is None else self.downsample(x)
        for block, cross in zip(self.res_blocks, self.attention_blocks):
            x = block(x, condition)
            x = cross(x.flatten(1, 2), states).view(x.shape)
        return x if self.upsample is None else self.upsample(x)


class ConditionEmbedding(nn.Module):
    """Two maps with a silu between them."""

    def __init__(self, inputs: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Matrix(inputs, width, bias=bias)
        self.linear_2 = Matrix(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The condition (B, width) of `x` (B, inputs)."""
        condition: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return condition


def waves(numbers: Tensor, size: int) -> Tensor:
    """The cos and sin (..., size) float32 of numbers (...) at frequencies from 1 to 1 / 10,000.

    The frequencies are rounded as they were in training: numbers are hundreds of pixels.
    """
    index = torch.arange(size // 2, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[..., None] * (-math.log(SLOWEST) * index / (size // 2)).exp()
    return torch.cat([angles.cos(), angles.sin()], -1)
