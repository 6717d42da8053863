"""Decoders of Llama's kind: stacks of attention and a gated layer, each behind a norm.

The names of the modules are those of Llama, Qwen2 and Qwen3 files. A decoder here is not causal of
itself: its attention is as wide as the mask says.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, Tables, attention, frequencies, tables_of
from mdiff.backbones.layers.backbone import Layout, SequenceBackbone
from mdiff.backbones.layers.modules import GatedMLP, Matrix, RootNorm
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

# Where a config does not say, as in Llama's and Qwen's own code.
ROPE_THETA = 10000.0


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

    def tables(self, positions: Tensor, size: int) -> Tables:
        """The tables (..., size) float32 of positions (...), for `attention`."""
        frequency = frequencies(size, self.base, positions.device)
        if self.bands is None:
            frequency = frequency / self.factor
        else:
            low, high, length = self.bands
            kept = (length * frequency / (2 * math.pi) - low) / (high - low)
            kept = kept.clamp(0, 1)
            frequency = (1 - kept) * frequency / self.factor + kept * frequency
        return tables_of(positions[..., None].float() * frequency)

    @classmethod
    def of(cls, fields: Fields) -> Self:
        """That of `rope_theta` and `rope_scaling`, or of `rope_parameters`, which precede them."""
        given = fields.described.get("rope_parameters") or fields.described.get("rope_scaling")
        scaling = given or {}
        if not isinstance(scaling, Mapping):
            raise CheckpointError(f"{fields.origin}: rope_scaling={given!r}: expected an object")
        inner = Fields(scaling, f"{fields.origin}: rope_scaling")
        holder = inner if "rope_theta" in scaling else fields
        base = holder.number("rope_theta", least=1, default=ROPE_THETA)
        name = "rope_type" if "rope_type" in scaling else "type"
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


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder's layers, and which biases and norms they have."""

    width: int
    heads: int
    key_heads: int
    head_width: int
    epsilon: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def of(cls, fields: Fields, **parts: bool) -> Self:
        """The sizes by their names in Llama's and Qwen's files, with these biases and norms."""
        width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        key_heads = key_heads_of(fields)
        given = fields.described.get("head_dim") is not None
        if not given and width % heads:
            raise CheckpointError(
                f"{fields.origin}: hidden_size={width}: expected a multiple of {heads} heads"
            )
        head_width = fields.whole("head_dim") if given else width // heads
        if head_width % 2:
            raise CheckpointError(f"{fields.origin}: a head of {head_width}: expected even")
        fields.choice("hidden_act", ("silu",))
        epsilon = fields.number("rms_norm_eps", most=1.0)
        return cls(width, heads, key_heads, head_width, epsilon, **parts)


class Attention(nn.Module):
    """Attention number `layer` of a decoder: a matrix each for query, key and value."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.head_width = layer, shape.head_width
        wide, narrow = shape.heads * shape.head_width, shape.key_heads * shape.head_width
        self.q_proj = Matrix(shape.width, wide, bias=shape.qkv_bias)
        self.k_proj = Matrix(shape.width, narrow, bias=shape.qkv_bias)
        self.v_proj = Matrix(shape.width, narrow, bias=shape.qkv_bias)
        self.o_proj = Matrix(wide, shape.width, bias=shape.out_bias)
        self.q_norm = RootNorm(shape.head_width, shape.epsilon) if shape.qk_norm else nn.Identity()
        self.k_norm = RootNorm(shape.head_width, shape.epsilon) if shape.qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The attention output (B, L, D)."""
        query, key, value = (
            matrix(x).unflatten(-1, (-1, self.head_width))
            for matrix in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        result: Tensor = self.o_proj(attention(query, key, value, context, layer=self.layer))
        return result


class Layer(nn.Module):
    """Attention, under its own `name`, then `mlp`, each behind a norm and added to the stream."""

    def __init__(
        self, shape: Shape, mixer: nn.Module, mlp: nn.Module, *, name: str = "self_attn"
    ) -> None:
        super().__init__()
        self.input_layernorm = RootNorm(shape.width, shape.epsilon)
        self.add_module(name, mixer)
        self.post_attention_layernorm = RootNorm(shape.width, shape.epsilon)
        self.mlp, self.name = mlp, name

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The stream (B, L, D) after both branches."""
        x = x + self.get_submodule(self.name)(self.input_layernorm(x), context)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Decoder(SequenceBackbone):
    """An embedding, layers and a norm, one after another: `trunk` is what a family writes.

    The first `rotated` entries of a head are rotated.
    """

    rotary: Rotary
    rotated: int

    @abstractmethod
    def trunk(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The embedding, the layers and the last norm."""

    def stream(self, tokens: Tensor, layout: Layout) -> Tensor:
        """The stream (B, L, D) behind the last norm."""
        table, layers, norm = self.trunk()
        x: Tensor = table(tokens)
        tables = self.rotary.tables(layout.positions, self.rotated)
        context = Context(tables, layout.mask, layout.cache)
        for layer in layers.children():
            x = layer(x, context)
        result: Tensor = norm(x)
        return result


class LayerDecoder(Decoder):
    """A decoder of `Layer`s, with an embedding, layers and a norm in `model`, and lm_head."""

    no_split = ("Layer",)
    # The name of the embedding in `model`.
    table_name: ClassVar[str] = "embed_tokens"

    def __init__(
        self, fields: Fields, shape: Shape, layers: Iterable[nn.Module], *, rotary: Rotary,
        rotated: int, mask_id: int | None, head: type[nn.Linear] = nn.Linear,
    ) -> None:  # fmt: skip
        ids = fields.whole("vocab_size", most=MOST_IDS)
        super().__init__(
            fields.described, vocab_size=ids, mask_id=mask_id,
            window=fields.whole("max_position_embeddings", most=MOST_IDS),
        )  # fmt: skip
        self.rotary, self.rotated = rotary, rotated
        self.model = nn.ModuleDict({
            self.table_name: nn.Embedding(ids, shape.width),
            "layers": nn.ModuleList(layers),
            "norm": RootNorm(shape.width, shape.epsilon),
        })  # fmt: skip
        self.lm_head = head(shape.width, ids, bias=False)

    def trunk(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The embedding, the layers and the last norm."""
        return self.model[self.table_name], self.model["layers"], self.model["norm"]


class LlamaDecoder(LayerDecoder):
    """The layout of Llama, Qwen2 and Qwen3."""

    def __init__(self, fields: Fields, shape: Shape, *, shifted: bool) -> None:
        mlp = partial(Matrix, bias=shape.mlp_bias)
        inner = fields.whole("intermediate_size")
        count = fields.whole("num_hidden_layers", most=MOST_LAYERS)
        layers = (
            Layer(shape, Attention(shape, n), GatedMLP(shape.width, inner, matrix=mlp))
            for n in range(count)
        )
        mask_id = mask_of(fields, fields.whole("vocab_size", most=MOST_IDS))
        super().__init__(
            fields, shape, layers, rotary=Rotary.of(fields), rotated=shape.head_width,
            mask_id=mask_id,
        )  # fmt: skip
        self.shifted = shifted


def key_heads_of(fields: Fields) -> int:
    """How many heads the keys have; CheckpointError where that is no divisor of the queries'."""
    heads = fields.whole("num_attention_heads")
    groups = fields.whole("num_key_value_heads", default=heads)
    if heads % groups:
        raise CheckpointError(
            f"{fields.origin}: num_key_value_heads={groups}: expected a divisor of {heads}"
        )
    return groups


def mask_of(fields: Fields, ids: int) -> int | None:
    """The config's mask id; CheckpointError where the model embeds no such id."""
    mask_id = fields.optional_id("mask_token_id")
    if mask_id is not None and mask_id >= ids:
        raise CheckpointError(
            f"{fields.origin}: mask_token_id={mask_id}: this model embeds ids below {ids}"
        )
    return mask_id
