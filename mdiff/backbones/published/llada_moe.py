"""LLaDA-MoE (inclusionAI 2025): LLaDA with a mixture of experts, in its published layout."""

from collections.abc import Mapping

from torch import nn

from mdiff.backbones.layers.decoder import Attention, Layer, Shape, key_heads_of
from mdiff.backbones.layers.modules import GatedMLP
from mdiff.backbones.layers.moe import (
    Mixture,
    MixtureDecoder,
    SoftmaxRouter,
    expert_counts,
    only,
)
from mdiff.errors import CheckpointError
from mdiff.files import MOST_LAYERS, Fields

# The published config.json has the model_type of the dense LLaDA: only this tells them apart.
ARCHITECTURES = ("LLaDAMoEModelLM",)


class LLaDAMoE(MixtureDecoder):
    """Full attention. The published config does not say which id is the mask."""


def llada_moe(described: Mapping[str, object]) -> LLaDAMoE:
    """The module of a config.json; CheckpointError for what is absurd or not supported."""
    fields = Fields(described)
    for name in ("clip_qkv", "shared_expert_intermediate_size"):
        only(fields, name)
    # The official code never renormalises the weights of the chosen experts.
    for name in ("norm_topk_prob", "attention_bias", "tie_word_embeddings"):
        only(fields, name, False)
    only(fields, "partial_rotary_factor", 1, 1.0)
    only(fields, "hidden_act", "silu")
    width, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    sparse = _sparse_layers(fields)
    if width % (2 * heads):
        raise CheckpointError(
            f"{fields.origin}: num_attention_heads={heads}: expected a half of a divisor of "
            f"hidden_size={width}"
        )
    shape = Shape(
        width, heads, key_heads_of(fields), width // heads, fields.number("rms_norm_eps", most=1.0),
        qk_norm=fields.flag("qk_layernorm"),
    )  # fmt: skip

    def mlp(*, sparse: bool) -> nn.Module:
        if not sparse:
            return GatedMLP(width, fields.whole("dense_intermediate_size"))
        count, used = expert_counts(fields, 1)
        inner = fields.whole("expert_intermediate_size")
        return Mixture(SoftmaxRouter(width, count, used), count, width=width, inner=inner)

    layers = (Layer(shape, Attention(shape, n), mlp(sparse=s)) for n, s in enumerate(sparse))
    return LLaDAMoE(fields, shape, layers, rotated=shape.head_width)


def _sparse_layers(fields: Fields) -> list[bool]:
    """Which layers have experts; CheckpointError for what cannot be a list of them."""
    count = fields.whole("num_hidden_layers", most=MOST_LAYERS)
    sparse = fields.described.get("moe_layer_freq", [1] * count)
    listed = sparse if isinstance(sparse, list) else []
    if len(listed) != count or any(n not in (0, 1) for n in listed):
        raise CheckpointError(
            f"{fields.origin}: moe_layer_freq={str(sparse)[:80]}: expected a 0 or a 1 for "
            f"each of {count} layers"
        )
    if any(listed):
        expert_counts(fields, count)
    return [bool(n) for n in listed]
