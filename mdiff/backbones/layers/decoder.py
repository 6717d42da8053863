"""Decoders of Llama's kind: stacks of attention and a gated layer, each behind a norm.

The names of the modules are those of Llama, Qwen2 and Qwen3 files. A decoder here is not causal of
itself: its attention is as wide as the mask says.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, Tables, attention, frequencies, tables_of
from mdiff.backbones.layers.backbone import Layout, SequenceBackbone
from mdiff.backbones.layers.modules import GatedMLP, Matrix, RootNorm
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

# Where a config does not say, as in Llama's and Qwen's own code.
ROPE_THETA = 10000.0


# What each kind of stretched rotary positions must state, with its least value.
SCALINGS: dict[str, dict[str, float]] = {
    "default": {},
    "linear": {"factor": 1},
    "llama3": {
        "factor": 1, "low_freq_factor": 0, "high_freq_factor": 0,
        "original_max_position_embeddings": 1,
    },
    "yarn": {"factor": 1e-3, "original_max_position_embeddings": 1},
}  # fmt: skip
# What else YaRN may state.
YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021): the base, and what stretches the frequencies.

    `scaling` is a config's rope_parameters, () for frequencies as they are: transformers makes
    the frequencies of it, and the factor of the tables. A query is multiplied by
    1 + `growth` ln(1 + floor(position / `original`)) (Llama 4).
    """

    base: float
    scaling: tuple[tuple[str, object], ...] = ()
    growth: float = 0.0
    original: float = 1.0

    def tables(self, positions: Tensor, size: int) -> Tables:
        """The tables (..., size) float32 of positions (...), for `attention`."""
        frequency, factor = self.frequencies(size, positions.device), 1.0
        if self.scaling:
            frequency, factor = scaled_frequencies(self.scaling, size, positions.device)
        cos, sin = tables_of(positions[..., None].float() * frequency)
        return (cos, sin) if factor == 1 else (cos * factor, sin * factor)

    def frequencies(self, size: int, device: torch.device) -> Tensor:
        """The frequencies (size / 2,) where nothing stretches them."""
        return frequencies(size, self.base, device)

    def query_scale(self, positions: Tensor) -> Tensor | None:
        """The factor of a query at each of positions (...); None where it is 1."""
        if not self.growth:
            return None
        return 1 + self.growth * (1 + (positions / self.original).floor()).log()

    @classmethod
    def of(cls, fields: Fields) -> Self:
        """That of `rope_theta` and `rope_scaling`, or of `rope_parameters`, which precede them."""
        given = fields.described.get("rope_parameters")
        given = fields.described.get("rope_scaling") if given in (None, {}) else given
        scaling = {} if given is None else given
        if not isinstance(scaling, Mapping):
            raise CheckpointError(f"{fields.origin}: rope_scaling={given!r}: expected an object")
        inner = Fields(scaling, f"{fields.origin}: rope_scaling")
        inner.choice("partial_rotary_factor", (1,), default=1)
        holder = inner if "rope_theta" in scaling else fields
        base = holder.number("rope_theta", least=1, default=ROPE_THETA)
        name = "rope_type" if "rope_type" in scaling else "type"
        kind = inner.choice(name, tuple(SCALINGS), default="default")
        stated: dict[str, object] = {
            each: inner.number(each, least=least) for each, least in SCALINGS[kind].items()
        }
        if kind == "llama3" and inner.number("high_freq_factor") <= inner.number("low_freq_factor"):
            raise CheckpointError(
                f"{inner.origin}: high_freq_factor={scaling['high_freq_factor']}: expected over "
                f"low_freq_factor={scaling['low_freq_factor']}"
            )
        for each in YARN if kind == "yarn" else ():
            if scaling.get(each) is not None:
                stated[each] = inner.number(each)
        if kind == "yarn":
            stated["truncate"] = inner.flag("truncate", default=True)
        if stated:
            stated |= {"rope_type": kind, "rope_theta": base}
        growth = inner.number("llama_4_scaling_beta", default=0.0)
        original = inner.number("original_max_position_embeddings", least=1) if growth else 1.0
        return cls(base, tuple(stated.items()), growth, original)


@lru_cache(maxsize=16)
def scaled_frequencies(
    scaling: tuple[tuple[str, object], ...], size: int, device: torch.device
) -> tuple[Tensor, float]:
    """The frequencies (size / 2,) float32 of rope_parameters, and the factor of the tables."""
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = dict(scaling)
    config = PretrainedConfig(
        rope_parameters=stated, head_dim=size, hidden_size=size, num_attention_heads=1,
        max_position_embeddings=stated.get("original_max_position_embeddings", size),
    )  # fmt: skip
    frequency, factor = ROPE_INIT_FUNCTIONS[str(stated["rope_type"])](config, device)
    return frequency.to(device), float(factor)


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
        fields.choice("partial_rotary_factor", (1,), default=1)
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
        scale = self.rotary.query_scale(layout.positions)
        context = Context(tables, layout.mask, layout.cache, scale)
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
    """The layout of Llama, Qwen2 and Qwen3; `mlp` makes layer n's second part."""

    def __init__(
        self, fields: Fields, shape: Shape, *, shifted: bool,
        mlp: Callable[[int], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        def gated(_: int) -> nn.Module:
            matrix = partial(Matrix, bias=shape.mlp_bias)
            return GatedMLP(shape.width, fields.whole("intermediate_size"), matrix=matrix)

        count = fields.whole("num_hidden_layers", most=MOST_LAYERS)
        made = mlp or gated
        layers = (Layer(shape, Attention(shape, n), made(n)) for n in range(count))
        mask_id = mask_of(fields, fields.whole("vocab_size", most=MOST_IDS))
        super().__init__(
            fields, shape, layers, rotary=Rotary.of(fields), rotated=shape.head_width,
            mask_id=mask_id,
        )  # fmt: skip
        self.shifted = shifted
        if fields.flag("tie_word_embeddings", default=False):
            self.tied = {"lm_head.weight": "model.embed_tokens.weight"}


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
