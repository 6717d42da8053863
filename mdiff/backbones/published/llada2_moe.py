"""LLaDA2 (inclusionAI 2025): a block model with a mixture of experts, in its published layout."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, attention
from mdiff.backbones.layers.decoder import Layer, Shape, key_heads_of
from mdiff.backbones.layers.modules import GatedMLP, Matrix, RootNorm, drawn
from mdiff.backbones.layers.moe import Mixture, MixtureDecoder, expert_counts, only, router_logits
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, MOST_WIDTH, Fields

ARCHITECTURES = ("LLaDA2MoeModelLM",)
# What the published models were trained with; their config.json does not say it.
BLOCK_LENGTH = 32
# A group of experts is as good as the best two in it (DeepSeek-AI 2024, section 2.1.2).
BEST_OF_GROUP = 2


class FusedAttention(nn.Module):
    """Grouped attention with a norm on each query and key; one matrix makes all three."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        heads, groups, size = shape.heads, shape.key_heads, shape.head_width
        self.layer, self.size, self.shares = layer, size, (heads, groups, groups)
        self.query_key_value = Matrix(shape.width, (heads + 2 * groups) * size)
        self.query_layernorm = RootNorm(size, shape.epsilon)
        self.key_layernorm = RootNorm(size, shape.epsilon)
        self.dense = Matrix(heads * size, shape.width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The attention output (B, L, D)."""
        every = self.query_key_value(x).unflatten(-1, (-1, self.size))
        query, key, value = every.split(self.shares, 2)
        query, key = self.query_layernorm(query), self.key_layernorm(key)
        result: Tensor = self.dense(attention(query, key, value, context, layer=self.layer))
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
        self.scale, self.of_any_type = fields.number("routed_scaling_factor"), True
        self.weight = drawn(count, width)
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
        score = score.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        chosen = score.topk(self.used, 1).indices
        weights = affinity.gather(1, chosen)
        if self.used > 1:
            # As published: sigmoids that all underflow weigh nothing.
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale


class LLaDA2(MixtureDecoder):
    """Positions attend to their own block of `block_length` and those before it."""

    table_name: ClassVar[str] = "word_embeddings"
    # LLaDA2.1 is trained to; nothing in its files sets it apart from 2.0.
    corrects: ClassVar[bool] = True


def llada2_moe(described: Mapping[str, object]) -> LLaDA2:
    """The module of a config.json; CheckpointError for what is absurd or not supported."""
    fields = Fields(described)
    for name in ("use_bias", "use_qkv_bias", "use_sliding_window", "tie_word_embeddings"):
        only(fields, name, False)
    for name in ("use_qk_norm", "use_rmsnorm", "norm_topk_prob", "moe_router_enable_expert_bias"):
        only(fields, name, True)
    only(fields, "hidden_act", "silu")
    only(fields, "score_function", "sigmoid")
    only(fields, "router_dtype", "fp32")
    shape, rotated = _shape_of(fields)
    count = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    dense = fields.whole("first_k_dense_replace", least=0)
    if dense < count:
        expert_counts(fields, count - dense)
    named = "block_length" if "block_length" in described else "block_size"
    layers = (
        Layer(shape, FusedAttention(shape, n), _mlp(fields, n >= dense), name="attention")
        for n in range(count)
    )
    model = LLaDA2(fields, shape, layers, rotated=rotated)
    model.block_length = fields.whole(named, most=MOST_IDS, default=BLOCK_LENGTH)
    return model


def _shape_of(fields: Fields) -> tuple[Shape, int]:
    """The sizes of the layers, and how many entries of a head are rotated.

    `head_dim` need not be a head's share of the width; where it is null, it is that.
    """
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    size = max(1, width // heads)
    if fields.described.get("head_dim") is not None:
        size = fields.whole("head_dim", most=MOST_WIDTH)
    rotated = int(size * fields.number("partial_rotary_factor", most=1.0))
    if rotated % 2:
        raise CheckpointError(
            f"{fields.origin}: partial_rotary_factor turns {rotated} entries of a head: "
            "expected an even number"
        )
    epsilon = fields.number("rms_norm_eps", most=1.0)
    return Shape(width, heads, key_heads_of(fields), size, epsilon), rotated


def _mlp(fields: Fields, sparse: bool) -> nn.Module:
    width = fields.whole("hidden_size")
    if not sparse:
        return GatedMLP(width, fields.whole("intermediate_size"))
    inner, shared = fields.whole("moe_intermediate_size"), 0
    if fields.described.get("num_shared_experts") is not None:
        shared = inner * fields.whole("num_shared_experts", least=0)
    router = Router(fields, width)
    return Mixture(router, len(router.expert_bias), width=width, inner=inner, shared=shared)
