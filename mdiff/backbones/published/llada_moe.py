"""LLaDA-MoE (inclusionAI 2025): LLaDA with a mixture of experts, in its published layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mdiff.backbones.layers.backbone import KeyValues, SequenceBackbone
from mdiff.backbones.layers.moe import (
    GatedLayer,
    Matrix,
    Norm,
    expert_counts,
    mixed_heads,
    of_experts,
    only,
    router_logits,
)
from mdiff.backbones.layers.transformer import rotary_tables
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

# The published config.json has the model_type of the dense LLaDA: only this tells them apart.
ARCHITECTURES = ("LLaDAMoEModelLM",)


def llada_moe(described: Mapping[str, Any]) -> LLaDAMoE:
    """The module of a config.json; CheckpointError for what is absurd or not supported."""
    fields = Fields(described)
    for name in ("clip_qkv", "rope_scaling", "rope_parameters", "shared_expert_intermediate_size"):
        only(fields, name)
    # The official code never renormalises the weights of the chosen experts.
    for name in ("norm_topk_prob", "attention_bias", "tie_word_embeddings"):
        only(fields, name, False)
    only(fields, "partial_rotary_factor", 1, 1.0)
    only(fields, "hidden_act", "silu")
    return LLaDAMoE(fields)


class LLaDAMoE(SequenceBackbone):
    """Every place sees every other. The published config does not say which id is the mask."""

    no_split = ("Layer",)

    def __init__(self, fields: Fields) -> None:
        super().__init__(
            fields.described,
            vocab_size=fields.whole("vocab_size", most=MOST_IDS),
            mask_id=fields.optional_id("mask_token_id", "mask_id"),
            window=fields.whole("max_position_embeddings", most=MOST_IDS),
        )
        self.model = Trunk(fields)
        self.lm_head = Matrix(fields.whole("hidden_size"), self.vocab_size)

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The matrix from features to logits."""
        return self.lm_head

    def stream(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, t: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads, (B, L, D)."""
        result: Tensor = self.model(tokens, positions, sees, cache)
        return result


class Trunk(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, fields: Fields) -> None:
        super().__init__()
        width = fields.whole("hidden_size")
        count = fields.whole("num_hidden_layers", most=MOST_LAYERS)
        sparse = fields.described.get("moe_layer_freq", [1] * count)
        if (
            not isinstance(sparse, list)
            or len(sparse) != count
            or any(n not in (0, 1) for n in sparse)
        ):
            raise CheckpointError(
                f"{fields.origin}: moe_layer_freq={str(sparse)[:80]}: expected a 0 or a 1 for "
                f"each of {count} layers"
            )
        if any(sparse):
            expert_counts(fields, count)
        heads = fields.whole("num_attention_heads")
        if width % (2 * heads):
            raise CheckpointError(
                f"{fields.origin}: num_attention_heads={heads}: expected a half of a divisor of "
                f"hidden_size={width}"
            )
        self.head_size, self.base = width // heads, fields.number("rope_theta", least=1.0)
        self.embed_tokens = nn.Embedding(fields.whole("vocab_size", most=MOST_IDS), width)
        self.layers = nn.ModuleList(
            Layer(fields, number, sparse=bool(sparse[number])) for number in range(count)
        )
        self.norm = Norm(width, fields.number("rms_norm_eps", most=1.0))

    def forward(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, cache: KeyValues | None
    ) -> Tensor:
        """The normalised stream (B, L, D)."""
        x = self.embed_tokens(tokens)
        tables = rotary_tables(positions, self.head_size, base=self.base)
        for layer in self.layers:
            x = layer(x, tables, sees, cache)
        normal: Tensor = self.norm(x)
        return normal


class Layer(nn.Module):
    """Attention, then experts or one gated layer, each behind a norm and added to the stream."""

    def __init__(self, fields: Fields, number: int, *, sparse: bool) -> None:
        super().__init__()
        width, eps = fields.whole("hidden_size"), fields.number("rms_norm_eps", most=1.0)
        self.input_layernorm, self.post_attention_layernorm = Norm(width, eps), Norm(width, eps)
        self.self_attn = Attention(fields, number)
        self.mlp = (
            Mixture(fields, width)
            if sparse
            else GatedLayer(width, fields.whole("dense_intermediate_size"))
        )

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """The stream `x` (B, L, D) after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), tables, sees, cache)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Attention(nn.Module):
    """Grouped attention with a norm on each query and key where the config has it."""

    def __init__(self, fields: Fields, number: int) -> None:
        super().__init__()
        width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
        groups = fields.whole("num_key_value_heads", most=heads, default=heads)
        if heads % groups:
            raise CheckpointError(
                f"{fields.origin}: num_key_value_heads={groups}: expected a divisor of {heads}"
            )
        size = width // heads
        self.number, self.heads, self.groups = number, heads, groups
        self.q_proj, self.o_proj = Matrix(width, heads * size), Matrix(heads * size, width)
        self.k_proj, self.v_proj = Matrix(width, groups * size), Matrix(width, groups * size)
        normed = fields.flag("qk_layernorm")
        eps = fields.number("rms_norm_eps", most=1.0)
        self.q_norm = Norm(size, eps) if normed else None
        self.k_norm = Norm(size, eps) if normed else None

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """Each place's mix (B, L, D) of what it sees."""
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        key, value = (m(x).unflatten(-1, (self.groups, -1)) for m in (self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        mixed = mixed_heads(query, key, value, tables, sees, layer=self.number, cache=cache)
        result: Tensor = self.o_proj(mixed)
        return result


class Mixture(nn.Module):
    """Each token's few experts, weighted by their share of the softmax over all of them."""

    def __init__(self, fields: Fields, width: int) -> None:
        super().__init__()
        count, self.used = expert_counts(fields, 1)
        inner = fields.whole("expert_intermediate_size")
        self.gate = Matrix(width, count)
        self.experts = nn.ModuleList(GatedLayer(width, inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (B, L, D)."""
        flat = x.flatten(0, 1)
        weights, chosen = router_logits(flat, self.gate.weight).softmax(-1).topk(self.used, -1)
        return of_experts(flat, self.experts, chosen, weights).view_as(x)
