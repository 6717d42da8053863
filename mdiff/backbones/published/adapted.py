"""Causal language models made into masked diffusion models, under Llama's and Qwen's names.

* Under a full mask: DiffuLLaMA (Gong et al. 2025), dLLM's "a2d", Open-dCoder;
* in blocks: SDAR (Cheng et al. 2025) and TraDo, its mixture of experts, Fast-dLLM v2 (Wu et al.
  2025), which takes a block's first token from the block before.

The weights are those of a Llama, Qwen2 or Qwen3 and so is the config, but for its architecture:
dLLM's names say what the model is, and so does DiscreteDiffusionModel, the class of DiffuLLaMA
(whose files have names of their own: write it into a config of them that names Llama). A plain
...ForCausalLM is taken only where its config.json also says "bidirectional": true; as it stands
it predicts the next token and would give nonsense. "shifted": true or false there says whether
the output at a position predicts the next one; without it DiffuLLaMA's and Fast-dLLM's are shifted
and the others are not. Open-dCoder is such a Qwen2ForCausalLM: bidirectional and shifted.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import nn

from mdiff.backbones.layers.decoder import LlamaDecoder, Shape
from mdiff.backbones.layers.modules import GatedMLP
from mdiff.backbones.layers.moe import Mixture, SoftmaxRouter, expert_counts
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, Fields


class Layout(NamedTuple):
    """What an architecture says beside its config.

    `layout` is that of the weights; `block` the config's entry of the block length, which is
    `length` where the config has none, as `mask_id` is the mask's id in a vocabulary that has it.
    """

    layout: str
    shifted: bool = False
    block: str | None = None
    length: int | None = None
    mask_id: int | None = None
    block_seed: bool = False


DIFFULLAMA = "DiscreteDiffusionModel"
LAYOUTS = {
    "A2DLlamaLMHeadModel": Layout("llama"),
    "A2DQwen2LMHeadModel": Layout("qwen2"),
    "A2DQwen3LMHeadModel": Layout("qwen3"),
    "LlamaForCausalLM": Layout("llama"),
    "Qwen2ForCausalLM": Layout("qwen2"),
    "Qwen3ForCausalLM": Layout("qwen3"),
    DIFFULLAMA: Layout("llama", shifted=True),
    "SDARForCausalLM": Layout("qwen3", block="block_size", length=4, mask_id=151669),
    "SDARMoeForCausalLM": Layout("qwen3_moe", block="block_size", length=4, mask_id=151669),
    "Fast_dLLM_QwenForCausalLM": Layout(
        "qwen2", shifted=True, block="bd_size", length=32, mask_id=151665, block_seed=True
    ),
}
# Causal models, which their config.json must say to be adapted.
CAUSAL = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ARCHITECTURES = tuple(LAYOUTS)


class Adapted(LlamaDecoder):
    """The model of the files; see `adapted`. With a `block_length` it is a block model."""

    block_length: int | None = None


class DiffuLLaMA(Adapted):
    """The names that DiffuLLaMA's own code saves: embed_tokens, denoise_model, lm_head."""

    def __init__(
        self, fields: Fields, shape: Shape, *, shifted: bool,
        mlp: Callable[[int], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(fields, shape, shifted=shifted, mlp=mlp)
        stack = self.model
        del self.model
        self.embed_tokens = stack.pop("embed_tokens")
        self.denoise_model = stack

    def trunk(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The embedding, the layers and the last norm."""
        layers, norm = self.denoise_model.children()
        return self.embed_tokens, layers, norm


def adapted(described: Mapping[str, object]) -> Adapted:
    """The model of an adapted config.json.

    Raises CheckpointError for a causal model that is not said to be adapted, for sizes out of
    range, a sliding window, or a model_type that is none of these layouts.
    """
    fields = Fields(described)
    named = described.get("architectures")
    name = next(each for each in LAYOUTS if isinstance(named, list) and each in named)
    if name in CAUSAL and not fields.flag("bidirectional", default=False):
        raise CheckpointError(
            f"{fields.origin}: {name} is a causal model, which is not supported; one that was "
            'adapted to a full mask says so there by "bidirectional": true, "shifted": true or '
            'false, and "mask_token_id"'
        )
    if name == DIFFULLAMA:
        fields.choice("model_type", ("llama",))
        fields.choice("tie_word_embeddings", (False,), default=False)
    kind = LAYOUTS[name]
    shifted = fields.flag("shifted", default=kind.shifted)
    make = DiffuLLaMA if name == DIFFULLAMA else Adapted
    model = make(fields, shape_of(fields, kind.layout), shifted=shifted, mlp=_mlp(fields, kind))
    if model.mask_id is None and kind.mask_id is not None and kind.mask_id < model.vocab_size:
        model.mask_id = kind.mask_id
    if kind.block is not None:
        model.block_length = fields.whole(kind.block, most=MOST_IDS, default=kind.length)
    model.block_seed = kind.block_seed
    return model


def shape_of(fields: Fields, layout: str) -> Shape:
    """The sizes of a "llama", "qwen2", "qwen3" or "qwen3_moe" config.

    Raises CheckpointError for a sliding window.
    """
    fields.choice("use_sliding_window", (False,), default=False)
    types = fields.described.get("layer_types") or []
    if not isinstance(types, list) or set(map(str, types)) - {"full_attention"}:
        raise CheckpointError(f"{fields.origin}: layer_types: only full_attention is supported")
    # Qwen2's projections always have a bias, its output none; the others' configs say.
    out = layout != "qwen2" and fields.flag("attention_bias", default=False)
    if layout != "llama":
        # Qwen's own code has other defaults than the numbers that follow from the width.
        for own in ("num_key_value_heads", *(() if layout == "qwen2" else ("head_dim",))):
            fields.whole(own)
    return Shape.of(
        fields, qkv_bias=out or layout == "qwen2", out_bias=out,
        mlp_bias=layout == "llama" and fields.flag("mlp_bias", default=False),
        qk_norm=layout.startswith("qwen3"),
    )  # fmt: skip


def _mlp(fields: Fields, kind: Layout) -> Callable[[int], nn.Module] | None:
    """What makes layer n's mixture of experts, or its dense layer; None where all are dense."""
    if kind.layout != "qwen3_moe":
        return None
    width, step = fields.whole("hidden_size"), fields.whole("decoder_sparse_step", default=1)
    dense = fields.described.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(n) is not int for n in dense):
        raise CheckpointError(f"{fields.origin}: mlp_only_layers: expected numbers of layers")
    count, used = expert_counts(fields, fields.whole("num_hidden_layers"))
    inner, normed = fields.whole("moe_intermediate_size"), fields.flag("norm_topk_prob")

    def layer(n: int) -> nn.Module:
        if n in dense or (n + 1) % step:
            return GatedMLP(width, fields.whole("intermediate_size"))
        router = SoftmaxRouter(width, count, used, normed=normed)
        return Mixture(router, count, width=width, inner=inner)

    return layer
