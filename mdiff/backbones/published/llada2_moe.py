"""LLaDA2 (inclusionAI 2025): a block model with a mixture of experts, in its published layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
from mdiff.files import MOST_IDS, MOST_LAYERS, MOST_WIDTH, Fields

ARCHITECTURES = ("LLaDA2MoeModelLM",)
# What the published models were trained with; their config.json does not say it.
BLOCK_LENGTH = 32
# A group of experts is as good as the best two in it (DeepSeek-AI 2024, section 2.1.2).
BEST_OF_GROUP = 2


def llada2_moe(described: Mapping[str, Any]) -> LLaDA2:
    """The module of a config.json; CheckpointError for what is absurd or not supported."""
    fields = Fields(described)
    for name in ("rope_scaling", "rope_parameters"):
        only(fields, name)
    for name in ("use_bias", "use_qkv_bias", "use_sliding_window", "tie_word_embeddings"):
        only(fields, name, False)
    for name in ("use_qk_norm", "use_rmsnorm", "norm_topk_prob", "moe_router_enable_expert_bias"):
        only(fields, name, True)
    only(fields, "hidden_act", "silu")
    only(fields, "score_function", "sigmoid")
    only(fields, "router_dtype", "fp32")
    return LLaDA2(fields)


class LLaDA2(SequenceBackbone):
    """Places see their own block of `block_length` and those before it."""

    no_split = ("Layer",)

    def __init__(self, fields: Fields) -> None:
        super().__init__(
            fields.described,
            vocab_size=fields.whole("vocab_size", most=MOST_IDS),
            mask_id=fields.optional_id("mask_token_id", "mask_id"),
            window=fields.whole("max_position_embeddings", most=MOST_IDS),
        )
        named = "block_length" if "block_length" in fields.described else "block_size"
        self.block_length = fields.whole(named, most=MOST_IDS, default=BLOCK_LENGTH)
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
        dense = fields.whole("first_k_dense_replace", least=0)
        if dense < count:
            expert_counts(fields, count - dense)
        # Only the first part of a head is turned.
        self.turned = int(_head_size(fields) * fields.number("partial_rotary_factor", most=1.0))
        if self.turned % 2:
            raise CheckpointError(
                f"{fields.origin}: partial_rotary_factor turns {self.turned} entries of a head: "
                "expected an even number"
            )
        self.base = fields.number("rope_theta", least=1.0)
        self.word_embeddings = nn.Embedding(fields.whole("vocab_size", most=MOST_IDS), width)
        self.layers = nn.ModuleList(
            Layer(fields, number, sparse=number >= dense) for number in range(count)
        )
        self.norm = Norm(width, fields.number("rms_norm_eps", most=1.0))

    def forward(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, cache: KeyValues | None
    ) -> Tensor:
        """The normalised stream (B, L, D)."""
        x = self.word_embeddings(tokens)
        tables = rotary_tables(positions, self.turned, base=self.base)
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
        self.attention = Attention(fields, number)
        self.mlp = (
            Mixture(fields, width)
            if sparse
            else GatedLayer(width, fields.whole("intermediate_size"))
        )

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """The stream `x` (B, L, D) after this layer."""
        x = x + self.attention(self.input_layernorm(x), tables, sees, cache)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Attention(nn.Module):
    """Grouped attention with a norm on each query and key; one matrix makes all three."""

    def __init__(self, fields: Fields, number: int) -> None:
        super().__init__()
        width, heads, size = fields.whole("hidden_size"), _heads(fields), _head_size(fields)
        groups = fields.whole("num_key_value_heads", most=heads, default=heads)
        if heads % groups:
            raise CheckpointError(
                f"{fields.origin}: num_key_value_heads={groups}: expected a divisor of {heads}"
            )
        self.number, self.size, self.shares = number, size, (heads, groups, groups)
        eps = fields.number("rms_norm_eps", most=1.0)
        self.query_key_value = Matrix(width, (heads + 2 * groups) * size)
        self.query_layernorm, self.key_layernorm = Norm(size, eps), Norm(size, eps)
        self.dense = Matrix(heads * size, width)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """Each place's mix (B, L, D) of what it sees."""
        every = self.query_key_value(x).unflatten(-1, (-1, self.size))
        query, key, value = every.split(self.shares, 2)
        query, key = self.query_layernorm(query), self.key_layernorm(key)
        mixed = mixed_heads(query, key, value, tables, sees, layer=self.number, cache=cache)
        result: Tensor = self.dense(mixed)
        return result


class Router(nn.Module):
    """Which experts a token uses and how much of each, in float32."""

    expert_bias: Tensor

    def __init__(self, fields: Fields, width: int) -> None:
        super().__init__()
        count, self.used = expert_counts(fields, 1)
        self.groups = fields.whole("n_group", most=count)
        self.kept = fields.whole("topk_group", most=self.groups)
        if count % self.groups or self.used > self.kept * (count // self.groups):
            raise CheckpointError(
                f"{fields.origin}: {count} experts in n_group={self.groups} groups, of which "
                f"topk_group={self.kept} are kept, do not give num_experts_per_tok={self.used}"
            )
        self.scale = fields.number("routed_scaling_factor")
        self.weight = nn.Parameter(torch.empty(count, width))
        self.register_buffer("expert_bias", torch.zeros(count))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of tokens `x` (N, D), (N, K) int64, and their weights (N, K).

        Affinities are sigmoids; the bias, which balances the load, chooses but does not weigh
        (Wang et al. 2024). First the groups with the best experts, then the experts in them.
        """
        affinity = router_logits(x, self.weight).sigmoid()
        score = (affinity + self.expert_bias).view(len(x), self.groups, -1)
        best = score.topk(min(BEST_OF_GROUP, score.shape[2]), 2).values.sum(2)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(1, best.topk(self.kept, 1).indices, True)
        chosen = (
            score.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(self.used, 1).indices
        )
        weights = affinity.gather(1, chosen)
        if self.used > 1:
            # As published: sigmoids that all underflow weigh nothing.
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale


class Mixture(nn.Module):
    """Each token's few experts, and one layer that all tokens share."""

    def __init__(self, fields: Fields, width: int) -> None:
        super().__init__()
        inner = fields.whole("moe_intermediate_size")
        shared = 0
        if fields.described.get("num_shared_experts") is not None:
            shared = inner * fields.whole("num_shared_experts", least=0)
        self.gate = Router(fields, width)
        self.experts = nn.ModuleList(
            GatedLayer(width, inner) for _ in range(len(self.gate.expert_bias))
        )
        self.shared_experts = GatedLayer(width, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (B, L, D)."""
        flat = x.flatten(0, 1)
        mixed = of_experts(flat, self.experts, *self.gate(flat)).view_as(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def _heads(fields: Fields) -> int:
    return fields.whole("num_attention_heads")


def _head_size(fields: Fields) -> int:
    """`head_dim`, which need not be a head's share of the width; where it is null, that."""
    if fields.described.get("head_dim") is None:
        return max(1, fields.whole("hidden_size") // _heads(fields))
    return fields.whole("head_dim", most=MOST_WIDTH)
