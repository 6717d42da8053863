"""The layers of aMUSEd's U-ViT (Patil et al. 2024), named as in the published files.

Grids are (B, h, w, C), lines of places (B, L, C); a 1 x 1 convolution is a map of each place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.kernels.dense import attend, linear

# The epsilons that no config entry sets.
RESPONSE_EPSILON, BLOCK_EPSILON = 1e-6, 1e-6
# How much wider a convolutional block is inside (Liu et al. 2022).
WIDENING = 4
SLOWEST = 10_000


class Linear(nn.Linear):
    """`nn.Linear` by the product of `layers.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        mapped = linear(x, self.weight)
        return mapped if self.bias is None else mapped + self.bias


class PlaceMap(nn.Conv2d):
    """A 1 x 1 convolution, as the map of each place that it is."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        mapped = linear(x, self.weight.flatten(1))
        return mapped if self.bias is None else mapped + self.bias


class Norm(nn.Module):
    """x / sqrt(mean x^2 + epsilon), times a weight if `affine`; the mean in float32."""

    def __init__(self, size: int, epsilon: float, *, affine: bool = True) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(size)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., size)."""
        wide = x if x.dtype == torch.float64 else x.float()
        normal = F.rms_norm(wide, x.shape[-1:], eps=self.epsilon).to(x.dtype)
        return normal if self.weight is None else normal * self.weight


class AdaptiveNorm(nn.Module):
    """(1 + scale) norm(x) + shift, scale and shift read from the condition."""

    def __init__(self, size: int, norm: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.linear = Linear(size, 2 * size, bias=bias)
        self.norm = norm

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """`x` (B, L, size) with what is told (B, size)."""
        scale, shift = self.linear(F.silu(told))[:, None].chunk(2, -1)
        adapted: Tensor = self.norm(x) * (1 + scale) + shift
        return adapted


class Attention(nn.Module):
    """Multi-head attention of (B, L, width) to (B, S, width)."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(width, width, bias=bias)
        self.to_v = Linear(width, width, bias=bias)
        self.to_out = nn.ModuleList([Linear(width, width, bias=bias)])

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """What each place of `x` makes of all that is seen."""
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.to_q(x), self.to_k(seen), self.to_v(seen))
        )
        mixed = attend(query, key, value, None, causal=False)
        result: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
        return result


class _Gate(nn.Module):
    """value * gelu(gate), both one map of x (Shazeer 2020)."""

    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        gated: Tensor = value * F.gelu(gate)
        return gated


class FeedForward(nn.Module):
    """The gated layer; `net` has a place that the files leave empty, for dropout."""

    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        gate = _Gate(width, inner, bias=bias)
        self.net = nn.Sequential(gate, nn.Identity(), Linear(inner, width, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x`."""
        result: Tensor = self.net(x)
        return result


class TransformerLayer(nn.Module):
    """Attention to itself, to what is told, and the gated layer, each behind an adaptive norm."""

    def __init__(
        self, width: int, heads: int, inner: int, *, bias: bool, epsilon: float, affine: bool
    ) -> None:
        super().__init__()
        root = [Norm(width, epsilon, affine=affine) for _ in range(2)]
        self.norm1 = AdaptiveNorm(width, root[0], bias=bias)
        self.attn1 = Attention(width, heads, bias=bias)
        self.norm2 = AdaptiveNorm(width, root[1], bias=bias)
        self.attn2 = Attention(width, heads, bias=bias)
        # The third norm alone takes the mean off.
        centred = nn.LayerNorm(width, epsilon, affine, bias)
        self.norm3 = AdaptiveNorm(width, centred, bias=bias)
        self.ff = FeedForward(width, inner, bias=bias)

    def forward(self, x: Tensor, seen: Tensor, told: Tensor) -> Tensor:
        """The stream `x` (B, L, width) after this layer; `seen` (B, S, width)."""
        h = self.norm1(x, told)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x, told), seen)
        result: Tensor = x + self.ff(self.norm3(x, told))
        return result


class ResponseNorm(nn.Module):
    """Global response normalisation over a sample's places (Woo et al. 2023, ConvNeXt V2)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(1, 1, 1, size))
        self.beta = nn.Parameter(torch.empty(1, 1, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised grid `x` (B, h, w, size)."""
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        share = response / (response.mean(-1, keepdim=True) + RESPONSE_EPSILON)
        normal: Tensor = self.gamma * (x * share) + self.beta + x
        return normal


class ConvBlock(nn.Module):
    """A ConvNeXt block, then shifted and scaled by the condition."""

    def __init__(self, width: int, told: int, *, bias: bool, epsilon: float, affine: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=bias)
        self.norm = Norm(width, epsilon, affine=affine)
        self.channelwise_linear_1 = Linear(width, WIDENING * width, bias=bias)
        self.channelwise_norm = ResponseNorm(WIDENING * width)
        self.channelwise_linear_2 = Linear(WIDENING * width, width, bias=bias)
        self.cond_embeds_mapper = Linear(told, 2 * width, bias=bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width) after this block; `told` (B, told)."""
        h = self.norm(self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        h = self.channelwise_norm(F.gelu(self.channelwise_linear_1(h)))
        x = x + self.channelwise_linear_2(h)
        scale, shift = self.cond_embeds_mapper(F.silu(told))[:, None, None].chunk(2, -1)
        adapted: Tensor = x * (1 + scale) + shift
        return adapted


class CrossBlock(nn.Module):
    """Twice attention to what is told, which is mapped to this width where it has another."""

    def __init__(self, width: int, heads: int, told: int, *, bias: bool) -> None:
        super().__init__()
        self.kv_mapper = Linear(told, width, bias=bias) if told != width else None
        self.norm1 = Norm(width, BLOCK_EPSILON)
        self.attn1 = Attention(width, heads, bias=bias)
        self.norm2 = Norm(width, BLOCK_EPSILON)
        self.attn2 = Attention(width, heads, bias=bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """The stream `x` (B, L, width) after this block; `seen` (B, S, told)."""
        if self.kv_mapper is not None:
            seen = self.kv_mapper(F.silu(seen))
        x = x + self.attn1(self.norm1(x), seen)
        result: Tensor = x + self.attn2(self.norm2(x), seen)
        return result


class Resize(nn.Module):
    """A norm, then a convolution of 2 x 2 places: halves the sides of a grid, or doubles them."""

    def __init__(
        self, width: int, *, halves: bool, bias: bool, epsilon: float, affine: bool
    ) -> None:
        super().__init__()
        self.norm = Norm(width, epsilon, affine=affine)
        kind = nn.Conv2d if halves else nn.ConvTranspose2d
        self.conv = kind(width, width, 2, stride=2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width) at the other size."""
        resized: Tensor = self.conv(self.norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return resized


class GridBlock(nn.Module):
    """Pairs of a ConvNeXt block and attention to what is told, on the grid.

    `halves` a grid before them or `doubles` it after them.
    """

    def __init__(
        self, width: int, *, depth: int, heads: int, told: int, halves: bool, doubles: bool,
        bias: bool, epsilon: float, affine: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        norm: dict[str, Any] = {"epsilon": epsilon, "affine": affine}
        self.downsample = Resize(width, halves=True, bias=bias, **norm) if halves else None
        self.res_blocks = nn.ModuleList(
            ConvBlock(width, told, bias=bias, **norm) for _ in range(depth)
        )
        self.attention_blocks = nn.ModuleList(
            CrossBlock(width, heads, told, bias=bias) for _ in range(depth)
        )
        self.upsample = Resize(width, halves=False, bias=bias, **norm) if doubles else None

    def forward(self, x: Tensor, seen: Tensor, told: Tensor) -> Tensor:
        """The grid `x` (B, h, w, width); `seen` (B, S, told), `told` (B, told)."""
        x = x if self.downsample is None else self.downsample(x)
        for block, cross in zip(self.res_blocks, self.attention_blocks):
            x = block(x, told)
            x = cross(x.flatten(1, 2), seen).view(x.shape)
        return x if self.upsample is None else self.upsample(x)


class ConditionEmbedding(nn.Module):
    """Two maps with a silu between them."""

    def __init__(self, inputs: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.linear_1 = Linear(inputs, width, bias=bias)
        self.linear_2 = Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The condition (B, width) of `x` (B, inputs)."""
        told: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return told


def waves(numbers: Tensor, size: int) -> Tensor:
    """The cos and sin (..., size) float32 of numbers (...) at frequencies from 1 to 1 / 10,000.

    The frequencies are rounded as they were in training: numbers are hundreds of pixels.
    """
    index = torch.arange(size // 2, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[..., None] * (-math.log(SLOWEST) * index / (size // 2)).exp()
    return torch.cat([angles.cos(), angles.sin()], -1)
