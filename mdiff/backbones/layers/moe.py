"""Layers of published mixtures of experts: norm, gated layer, routing by token, rotary heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.backbone import KeyValues
from mdiff.backbones.layers.transformer import rotate
from mdiff.errors import CheckpointError
from mdiff.files import MOST_EXPERTS, Fields
from mdiff.kernels.dense import linear

# Twice what the largest published mixtures have, all layers together.
MOST_EXPERTS_IN_ALL = 1 << 16


def only(fields: Fields, name: str, *known: Any) -> None:
    """Refuse an entry that is there and neither null nor one of `known`; CheckpointError."""
    value = fields.described.get(name)
    # 0 and false compare equal: the type is part of what an entry says.
    if value is not None and not any(value == one and type(value) is type(one) for one in known):
        raise CheckpointError(
            f"{fields.origin}: {name}={value!r} is not supported; known: "
            f"{', '.join(map(repr, [*known, None]))}"
        )


def expert_counts(fields: Fields, layers: int) -> tuple[int, int]:
    """The experts of a layer and how many of them a token uses; CheckpointError if absurd."""
    experts = fields.whole("num_experts", most=MOST_EXPERTS)
    if experts * layers > MOST_EXPERTS_IN_ALL:
        raise CheckpointError(
            f"{fields.origin}: num_experts={experts} in each of {layers} layers: expected at most "
            f"{MOST_EXPERTS_IN_ALL} in all"
        )
    return experts, fields.whole("num_experts_per_tok", most=experts)


class Norm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight over the last axis, in float32 but for the weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D), of its type."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return self.weight * (wide * scale).to(x.dtype)


class Matrix(nn.Linear):
    """A map without a bias, by the product that is fast on this processor."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        return linear(x, self.weight)


class GatedLayer(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, eq. 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Matrix(width, inner), Matrix(width, inner)
        self.down_proj = Matrix(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (..., D)."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Each token's logit of each expert (N, E), in float32 at least; `weight` (E, D)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.linear(wide, weight.to(wide.dtype))


def of_experts(
    x: Tensor, experts: Sequence[nn.Module] | nn.ModuleList, chosen: Tensor, weights: Tensor
) -> Tensor:
    """sum_k weights[n, k] experts[chosen[n, k]](x[n]) of tokens `x` (N, D).

    `chosen` (N, K) int64, `weights` (N, K). Tokens are sorted by expert, and each expert runs
    once, on its own. The sum is taken in the type of the weights.
    """
    order = chosen.flatten().argsort(stable=True)
    sizes = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    parts = torch.split(x[order // chosen.shape[1]], sizes)
    made = torch.cat([expert(part) for expert, part in zip(experts, parts) if len(part)])
    spread = torch.empty_like(made).index_copy(0, order, made).view(*chosen.shape, -1)
    return (spread * weights[..., None]).sum(1).to(x.dtype)


def mixed_heads(
    query: Tensor, key: Tensor, value: Tensor, tables: tuple[Tensor, Tensor],
    sees: Tensor | None, *, layer: int, cache: KeyValues | None,
) -> Tensor:  # fmt: skip
    """What each place sees, (B, L, H * D), of query (B, L, H, D), key and value (B, L, G, D).

    The first entries of a head are turned by `tables` (1|B, L, R) from `rotary_tables`, the
    other D - R are not (GPT-NeoX's partial rotation); each key serves H / G heads. What the
    cache has of the layer comes before these places.
    """
    tables = tables[0][:, :, None].to(query.dtype), tables[1][:, :, None].to(query.dtype)
    query, key = (_turned(x, *tables).transpose(1, 2) for x in (query, key))
    value = value.transpose(1, 2)
    if cache is not None:
        key, value = cache.joined(layer, key, value)
    shares = query.shape[1] // key.shape[1]
    if shares > 1 and sees is not None:
        # The fused kernels that take a mask do not take groups.
        key, value = key.repeat_interleave(shares, 1), value.repeat_interleave(shares, 1)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=sees, enable_gqa=key.shape[1] != query.shape[1]
    )
    return mixed.transpose(1, 2).flatten(2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return rotate(x, cos, sin)
    return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], -1)
