"""What backbones share: norm, attention with rotary positions, SwiGLU, who sees whom."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.kernels.dense import attend, dropout, linear, rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` with a learned weight (D,), ones at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D)."""
        return rms_norm(x, self.weight)


def attention_layout(
    tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor | None]:
    """Each token's position, (1 or B, L) int64, and which places it sees, (B, 1, L, L) bool.

    A position is the rank among the valid tokens of the same document, so that neither
    padding on either side nor what is packed beside it moves a document. A place sees the
    valid places of its own document (with `causal`, those up to itself), and always itself,
    so that no row of padding is empty. None means that nothing is cut (but by causality).
    """
    length = tokens.shape[1]
    if valid is None and documents is None:
        return torch.arange(length, device=tokens.device)[None], None
    sees = torch.ones(1, 1, 1, dtype=torch.bool, device=tokens.device)
    if valid is not None:
        sees = valid[:, None, :]
    if documents is None:
        positions = (sees[:, 0].cumsum(1) - 1).clamp(min=0)
    else:
        sees = sees & (documents[:, :, None] == documents[:, None, :])
        positions = sees.tril(-1).sum(2)
    sees = sees | torch.eye(length, dtype=torch.bool, device=tokens.device)
    return positions, (sees.tril() if causal else sees)[:, None]


def rotary_tables(
    positions: Tensor,
    size: int,
    *,
    grid: Sequence[int] | None = None,
    axes: Tensor | None = None,
    base: float,
) -> tuple[Tensor, Tensor]:
    """The cos and signed sin (..., size) float32 of positions (...), for `rotate`.

    Angles are position * base^(-k / K), k < K = size / 2 (Su et al. 2021, eq. 15). With
    `grid=(h, w)` a position is a row and a column of w, half of the frequencies each; with
    `axes` (places, 2), from `layout_axes`, it is the row and column found there.
    """
    if axes is not None:
        on = list(axes.to(positions.device)[positions].unbind(-1))
    else:
        on = [positions] if grid is None else [positions // grid[1], positions % grid[1]]
    count = size // 2 // len(on)
    powers = torch.arange(count, dtype=torch.float32, device=positions.device) / count
    angles = torch.cat([axis[..., None] * base**-powers for axis in on], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def layout_axes(layout: Sequence[Sequence[int]]) -> Tensor:
    """The row and column (places, 2) int64 of each place of a canvas of several runs.

    A run (h, w, each) has h rows of w places with `each` tokens side by side, which share a
    place; it begins where neither a row nor a column of an earlier run is.
    """
    found, start = [], 0
    for h, w, each in layout:
        row, column = torch.meshgrid(
            torch.arange(h, device="cpu"), torch.arange(w, device="cpu"), indexing="ij"
        )
        places = torch.stack([row, column], -1).reshape(-1, 2) + start
        found.append(places.repeat_interleave(each, 0))
        start += max(h, w)
    return torch.cat(found)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The pairs (x_k, x_{k + D/2}) of `x` (..., D) turned by their angles."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def time_features(t: Tensor, size: int) -> Tensor:
    """The cos and sin (B, size) of t (B,) in [0, 1] at frequencies from 1000 down to 0.1.

    The diffusion step embedding of Ho et al. 2020 over 1,000 steps.
    """
    powers = torch.arange(size // 2, dtype=torch.float32, device=t.device) / (size // 2)
    angles = 1000 * t.float()[:, None] * 10000**-powers
    return torch.cat([angles.cos(), angles.sin()], -1)


class Projection(nn.Linear):
    """A matrix without bias that knows the standard deviation it starts with.

    `parts` is how many maps of their own lie in it one above the other, for optimisers.
    """

    def __init__(self, inputs: int, outputs: int, init_std: float, *, parts: int = 1) -> None:
        self.init_std = init_std
        super().__init__(inputs, outputs, bias=False)
        self.weight.parts = parts  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        return linear(x, self.weight)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; query, key and value are one matrix."""

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool, causal: bool, init_std: float,
        out_std: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = Projection(width, 3 * width, init_std, parts=3)
        # One weight for each axis of a query's and of a key's head (Henry et al. 2020).
        self.qk_norm = RMSNorm(2 * (width // heads)) if qk_norm else None
        self.out = Projection(width, width, out_std)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None) -> Tensor:
        """Each place's mix (B, L, D) of what it sees; `tables` from `rotary_tables`, (1|B, L, .).

        `sees` (B, 1, L, L) bool already holds the causality; None is everything (or, if
        causal, everything before).
        """
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        qk = qkv[:, :, :2]
        if self.qk_norm is not None:
            qk = rms_norm(qk, self.qk_norm.weight.view(2, 1, -1))
        cos, sin = (table[:, :, None, None].to(qk.dtype) for table in tables)
        query, key = rotate(qk, cos, sin).permute(2, 0, 3, 1, 4).unbind()
        value = qkv[:, :, 2].transpose(1, 2)
        mixed = attend(query, key, value, sees, causal=self.causal and sees is None)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class SwiGLU(nn.Module):
    """The gated layer out(silu(gate) * value) (Shazeer 2020, eq. 6); `into` holds both."""

    def __init__(self, width: int, inner: int, *, init_std: float, out_std: float) -> None:
        super().__init__()
        self.into = Projection(width, 2 * inner, init_std, parts=2)
        self.out = Projection(inner, width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (..., D)."""
        gate, value = self.into(x).chunk(2, -1)
        result: Tensor = self.out(F.silu(gate) * value)
        return result


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """The adaLN of a normalised `x`: (1 + scale) x + shift, or `x` where there are none."""
    return x if shift is None or scale is None else x + x * scale + shift


class Block(nn.Module):
    """Attention, then SwiGLU, each behind a norm and added to the stream."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_width: int,
        depth: int,
        condition_width: int = 0,
        qk_norm: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        # The stream sums 2 depth branches: this keeps its variance independent of the depth.
        out_std = init_std / math.sqrt(2 * depth)
        self.dropout = dropout
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(
            width, heads, qk_norm=qk_norm, causal=causal, init_std=init_std, out_std=out_std
        )
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, mlp_width, init_std=init_std, out_std=out_std)
        self.modulation = Projection(condition_width, 6 * width, 0.0) if condition_width else None

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        sees: Tensor | None,
        told: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The stream `x` (B, L, D) after this block; (N, D) of the flat `rows` (N,) if given.

        `told` (B, C) gives the shift, scale and gate of both branches.
        """
        first: tuple[Tensor | None, ...] = (None, None, None)
        second: tuple[Tensor | None, ...] = (None, None, None)
        if self.modulation is not None and told is not None:
            six = self.modulation(told)[:, None].chunk(6, -1)
            first, second = (six[0], six[1], six[2]), (six[3], six[4], six[5])
        shift, scale, gate = first
        h = self.attention(modulated(self.attention_norm(x), shift, scale), tables, sees)
        x = x + self._gated(h, gate)
        if rows is not None:
            length = x.shape[1]
            x = x.flatten(0, 1).index_select(0, rows)
            second = tuple(of_rows(each, rows, length) for each in second)
        shift, scale, gate = second
        return x + self._gated(self.mlp(modulated(self.mlp_norm(x), shift, scale)), gate)

    def _gated(self, x: Tensor, gate: Tensor | None) -> Tensor:
        x = dropout(x, self.dropout) if self.training and self.dropout else x
        return x if gate is None else x + x * gate


def of_rows(each: Tensor | None, rows: Tensor, length: int) -> Tensor | None:
    """What is said to each sample, (B, 1, D), at flat rows of B * length places: (N, D)."""
    return None if each is None else each[:, 0].index_select(0, rows // length)
