"""The layers of our own transformer (`mdiff.backbones.transformer`)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, Tables, attention, rotate
from mdiff.backbones.layers.config import TransformerConfig
from mdiff.backbones.layers.modules import Matrix, RMSNorm, modulated
from mdiff.kernels.dense import dropout, rms_norm


def time_features(t: Tensor, size: int) -> Tensor:
    """The cos and sin (B, size) of t (B,) in [0, 1] at frequencies from 1000 down to 0.1.

    The diffusion step embedding of Ho et al. 2020 over 1,000 steps.
    """
    powers = torch.arange(size // 2, dtype=torch.float32, device=t.device) / (size // 2)
    angles = 1000 * t.float()[:, None] * 10000**-powers
    return torch.cat([angles.cos(), angles.sin()], -1)


class Projection(Matrix):
    """A matrix without bias and the standard deviation of its initial values.

    `parts` is how many matrices are stacked in it, for optimisers.
    """

    def __init__(self, inputs: int, outputs: int, init_std: float, *, parts: int = 1) -> None:
        self.init_std = init_std
        super().__init__(inputs, outputs)
        self.weight.parts = parts  # type: ignore[attr-defined]


class Attention(nn.Module):
    """Multi-head attention with rotary positions; query, key and value are one matrix."""

    def __init__(self, config: TransformerConfig, *, out_std: float) -> None:
        super().__init__()
        width, self.heads, self.causal = config.width, config.heads, config.causal
        self.qkv = Projection(width, 3 * width, config.init_std, parts=3)
        # One weight for each axis of a query's and of a key's head (Henry et al. 2020).
        self.qk_norm = RMSNorm(2 * (width // self.heads)) if config.qk_norm else None
        self.out = Projection(width, width, out_std)

    def forward(self, x: Tensor, tables: Tables, mask: Tensor | None) -> Tensor:
        """The attention output (B, L, D); `tables` from `rotary_tables`, (1 or B, L, .).

        `mask` (B, 1, L, L) bool already holds the causality; None is everything (or, if
        causal, everything before).
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        qk = qkv[:, :, :2]
        if self.qk_norm is not None:
            qk = rms_norm(qk, self.qk_norm.weight.view(2, 1, -1))
        cos, sin = (table[:, :, None, None].to(qk.dtype) for table in tables)
        query, key = rotate(qk, cos, sin).unbind(2)
        mixed = attention(
            query, key, qkv[:, :, 2], Context(mask=mask), causal=self.causal and mask is None
        )
        result: Tensor = self.out(mixed)
        return result


class SwiGLU(nn.Module):
    """The gated layer out(silu(gate) * value) (Shazeer 2020, eq. 6); `into` holds both."""

    def __init__(self, config: TransformerConfig, *, out_std: float) -> None:
        super().__init__()
        self.into = Projection(config.width, 2 * config.mlp_width, config.init_std, parts=2)
        self.out = Projection(config.mlp_width, config.width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (..., D)."""
        gate, value = self.into(x).chunk(2, -1)
        result: Tensor = self.out(F.silu(gate) * value)
        return result


class Block(nn.Module):
    """Attention, then SwiGLU, each behind a norm and added to the stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        # The stream sums 2 depth branches: this keeps its variance independent of the depth.
        out_std = config.init_std / math.sqrt(2 * config.depth)
        self.dropout = config.dropout
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(config, out_std=out_std)
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(config, out_std=out_std)
        self.modulation = None
        if config.conditional:
            self.modulation = Projection(config.condition_width, 6 * width, 0.0)

    def forward(
        self, x: Tensor, tables: Tables, mask: Tensor | None, condition: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The stream `x` (B, L, D) after this block; (N, D) of the flat `rows` (N,) if given.

        `condition` (B, C) gives the shift, scale and gate of both branches.
        """
        six: tuple[Tensor | None, ...] = (None,) * 6
        if self.modulation is not None and condition is not None:
            six = self.modulation(condition)[:, None].chunk(6, -1)
        shift, scale, gate = six[:3]
        h = self.attention(modulated(self.attention_norm(x), shift, scale), tables, mask)
        x = x + self._gated(h, gate)
        shift, scale, gate = six[3:]
        if rows is not None:
            length = x.shape[1]
            x = x.flatten(0, 1).index_select(0, rows)
            shift, scale, gate = (of_rows(each, rows, length) for each in six[3:])
        return x + self._gated(self.mlp(modulated(self.mlp_norm(x), shift, scale)), gate)

    def _gated(self, x: Tensor, gate: Tensor | None) -> Tensor:
        x = dropout(x, self.dropout) if self.training and self.dropout else x
        return x if gate is None else x + x * gate


def of_rows(each: Tensor | None, rows: Tensor, length: int) -> Tensor | None:
    """The value of each sample, (B, 1, D), at flat rows of B * length positions: (N, D)."""
    return None if each is None else each[:, 0].index_select(0, rows // length)
