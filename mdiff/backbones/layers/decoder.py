"""Layers of Llama's kind, and the decoder that Llama, Qwen2 and Qwen3 files are laid out for.

The names of the decoder's modules are those of the published files. Attention is as wide as
`sees` says: a decoder here is not causal of itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdiff.backbones.layers.backbone import KeyValues, SequenceBackbone
from mdiff.backbones.layers.transformer import rotate
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields
from mdiff.kernels.dense import attend, linear

# Where a config does not say, as in Llama's and Qwen's own code.
ROPE_THETA = 10000.0


class Matrix(nn.Linear):
    """A matrix (D, inputs), by default without a bias, multiplied by `layers.linear`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class Norm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) * weight over the last axis (Zhang & Sennrich 2019, eq. 4).

    The mean is taken in float32 at least; the weight multiplies what is back in the type of x.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D)."""
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        return self.weight * wide.to(x.dtype)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): base, and how the frequencies are stretched.

    All of them are divided by `factor` or, with `bands` = (low, high, original length), those
    that turn less than `low` times within the original length, none that turns more than
    `high` times, and the ones between in part (Llama 3.1).
    """

    base: float
    factor: float = 1.0
    bands: tuple[float, float, float] | None = None

    def tables(self, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The cos and signed sin (..., size) float32 of positions (...), for `layers.rotate`."""
        powers = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
        frequency = 1 / self.base**powers
        if self.bands is None:
            frequency = frequency / self.factor
        else:
            low, high, length = self.bands
            kept = (length * frequency / (2 * math.pi) - low) / (high - low)
            kept = kept.clamp(0, 1)
            frequency = (1 - kept) * frequency / self.factor + kept * frequency
        angles = positions[..., None].float() * frequency
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    @classmethod
    def of(cls, fields: Fields) -> Rotary:
        """What `rope_theta` and `rope_scaling`, or `rope_parameters` in their place, say."""
        said = fields.described.get("rope_parameters") or fields.described.get("rope_scaling") or {}
        if not isinstance(said, Mapping):
            raise CheckpointError(f"{fields.origin}: rope_scaling={said!r}: expected an object")
        inner = Fields(said, f"{fields.origin}: rope_scaling")
        whole = inner if "rope_theta" in said else fields
        base = whole.number("rope_theta", least=1, default=ROPE_THETA)
        name = "rope_type" if "rope_type" in said else "type"
        kind = inner.choice(name, ("default", "linear", "llama3"), default="default")
        if kind == "default":
            return cls(base)
        factor = inner.number("factor", least=1)
        if kind == "linear":
            return cls(base, factor)
        low = inner.number("low_freq_factor", least=0)
        high = inner.number("high_freq_factor", least=0)
        if high <= low:
            raise CheckpointError(f"{inner.origin}: high_freq_factor={high}: expected over {low}")
        return cls(base, factor, (low, high, inner.number("original_max_position_embeddings")))


def mixed(
    query: Tensor, key: Tensor, value: Tensor, sees: Tensor | None, *,
    layer: int, cache: KeyValues | None,
) -> Tensor:  # fmt: skip
    """Attention of rotated queries (B, H, L, D) over keys and values (B, G, L, D): (B, L, H D).

    G divides H: each key serves H / G heads in a row (Ainslie et al. 2023). What the cache
    keeps of the layer stands before them.
    """
    if cache is not None:
        key, value = cache.joined(layer, key, value)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    return attend(query, key, value, sees, causal=False).transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, and which biases and norms it has."""

    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    ids: int
    epsilon: float
    rotary: Rotary
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool

    @classmethod
    def of(
        cls, fields: Fields, *, qkv_bias: bool, out_bias: bool, mlp_bias: bool, qk_norm: bool
    ) -> Shape:
        """The sizes by their names in Llama's and Qwen's files."""
        width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        key_heads = fields.whole("num_key_value_heads", default=heads)
        if heads % key_heads:
            raise CheckpointError(
                f"{fields.origin}: num_key_value_heads={key_heads}: expected a divisor of {heads}"
            )
        given = fields.described.get("head_dim") is not None
        if not given and width % heads:
            raise CheckpointError(
                f"{fields.origin}: hidden_size={width}: expected a multiple of {heads} heads"
            )
        head_width = fields.whole("head_dim") if given else width // heads
        if head_width % 2:
            raise CheckpointError(f"{fields.origin}: a head of {head_width}: expected even")
        fields.choice("hidden_act", ("silu",))
        return cls(
            width, fields.whole("intermediate_size"),
            fields.whole("num_hidden_layers", most=MOST_LAYERS), heads, key_heads, head_width,
            fields.whole("vocab_size", most=MOST_IDS), fields.number("rms_norm_eps", most=1.0),
            Rotary.of(fields), qkv_bias, out_bias, mlp_bias, qk_norm,
        )  # fmt: skip


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        wide, narrow = shape.heads * shape.head_width, shape.key_heads * shape.head_width
        self.q_proj = Matrix(shape.width, wide, bias=shape.qkv_bias)
        self.k_proj = Matrix(shape.width, narrow, bias=shape.qkv_bias)
        self.v_proj = Matrix(shape.width, narrow, bias=shape.qkv_bias)
        self.o_proj = Matrix(wide, shape.width, bias=shape.out_bias)
        self.q_norm = Norm(shape.head_width, shape.epsilon) if shape.qk_norm else nn.Identity()
        self.k_norm = Norm(shape.head_width, shape.epsilon) if shape.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None, *,
        layer: int, cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """Each place's mix (B, L, D) of what it sees."""
        parts = (-1, self.head_width)
        query = self.q_norm(self.q_proj(x).unflatten(-1, parts)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).unflatten(-1, parts)).transpose(1, 2)
        value = self.v_proj(x).unflatten(-1, parts).transpose(1, 2)
        # The files' own code turns in the type of the weights.
        cos, sin = (table[:, None].to(x.dtype) for table in tables)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        result: Tensor = self.o_proj(mixed(query, key, value, sees, layer=layer, cache=cache))
        return result


class _Gated(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Matrix(shape.width, shape.inner, bias=shape.mlp_bias)
        self.up_proj = Matrix(shape.width, shape.inner, bias=shape.mlp_bias)
        self.down_proj = Matrix(shape.inner, shape.width, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate x) up x) (Shazeer 2020, eq. 6)."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.width, shape.epsilon)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = Norm(shape.width, shape.epsilon)
        self.mlp = _Gated(shape)

    def forward(self, x: Tensor, *context: Any, layer: int, cache: KeyValues | None) -> Tensor:
        """The stream (B, L, D) after both branches; `context` as `_Attention` takes it."""
        x = x + self.self_attn(self.input_layernorm(x), *context, layer=layer, cache=cache)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Decoder(SequenceBackbone):
    """The layout of Llama, Qwen2 and Qwen3: model.layers and lm_head."""

    no_split: ClassVar[tuple[str, ...]] = ("_Layer",)

    def __init__(self, fields: Fields, shape: Shape, *, shifted: bool) -> None:
        super().__init__(
            fields.described, vocab_size=shape.ids, mask_id=mask_of(fields, shape.ids),
            window=fields.whole("max_position_embeddings", most=MOST_IDS),
        )  # fmt: skip
        self.shape, self.shifted = shape, shifted
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(shape.ids, shape.width),
            "layers": nn.ModuleList(_Layer(shape) for _ in range(shape.layers)),
            "norm": Norm(shape.width, shape.epsilon),
        })  # fmt: skip
        self.lm_head = nn.Linear(shape.width, shape.ids, bias=False)

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """What makes logits (N, V) of the stream's rows (N, D)."""
        return self.lm_head

    @property
    def trunk(self) -> Mapping[str, Any]:
        """The modules of the stream, by the names of the files."""
        return self.model  # type: ignore[return-value]

    def stream(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, t: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """The stream (B, L, D) behind the last norm."""
        trunk = self.trunk
        x: Tensor = trunk["embed_tokens"](tokens)
        tables = self.shape.rotary.tables(positions, self.shape.head_width)
        for number, layer in enumerate(trunk["layers"]):
            x = layer(x, tables, sees, layer=number, cache=cache)
        result: Tensor = trunk["norm"](x)
        return result


def mask_of(fields: Fields, ids: int) -> int | None:
    """The config's mask id; CheckpointError where the model embeds no such id."""
    mask_id = fields.optional_id("mask_token_id")
    if mask_id is not None and mask_id >= ids:
        raise CheckpointError(
            f"{fields.origin}: mask_token_id={mask_id}: this model embeds ids below {ids}"
        )
    return mask_id
