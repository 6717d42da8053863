"""Causal language models adapted to a full mask: DiffuLLaMA (Gong et al. 2025), dLLM's "a2d".

The weights are those of a Llama, Qwen2 or Qwen3 and so is the config, but for its architecture:
dLLM's names say what the model is, and so does DiscreteDiffusionModel, the class of DiffuLLaMA
(whose files have names of their own: write it into a config of them that names Llama). A plain
...ForCausalLM is taken only where its config.json also says "bidirectional": true; as it stands
it predicts the next token and would give nonsense. "shifted": true or false there says whether
the output at a position predicts the next one; without it DiffuLLaMA's is shifted and the others
are not.
"""

from collections.abc import Mapping

from torch import nn

from mdiff.backbones.layers.decoder import LlamaDecoder, Shape
from mdiff.errors import CheckpointError
from mdiff.files import Fields

DIFFULLAMA = "DiscreteDiffusionModel"
# The layout of each architecture.
LAYOUTS = {
    "A2DLlamaLMHeadModel": "llama", "A2DQwen2LMHeadModel": "qwen2", "A2DQwen3LMHeadModel": "qwen3",
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
    DIFFULLAMA: "llama",
}  # fmt: skip
ARCHITECTURES = tuple(LAYOUTS)


class Adapted(LlamaDecoder):
    """The model of the files; see `adapted`. With a `block_length` it is a block model."""

    block_length: int | None = None


class DiffuLLaMA(Adapted):
    """The names that DiffuLLaMA's own code saves: embed_tokens, denoise_model, lm_head."""

    def __init__(self, fields: Fields, shape: Shape, *, shifted: bool) -> None:
        super().__init__(fields, shape, shifted=shifted)
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
    layout = LAYOUTS[name]
    if name.endswith("ForCausalLM") and not fields.flag("bidirectional", default=False):
        raise CheckpointError(
            f"{fields.origin}: {name} is a causal model, which is not supported; one that was "
            'adapted to a full mask says so there by "bidirectional": true, "shifted": true or '
            'false, and "mask_token_id"'
        )
    if name == DIFFULLAMA:
        fields.choice("model_type", ("llama",))
    fields.choice("use_sliding_window", (False,), default=False)
    # Qwen2's projections always have a bias, its output none; the others' configs say.
    bias = layout != "qwen2" and fields.flag("attention_bias", default=False)
    if layout != "llama":
        # Qwen's own code has other defaults than the numbers that follow from the width.
        for own in ("num_key_value_heads", *(("head_dim",) if layout == "qwen3" else ())):
            fields.whole(own)
    shape = Shape.of(
        fields, qkv_bias=bias or layout == "qwen2", out_bias=bias,
        mlp_bias=layout == "llama" and fields.flag("mlp_bias", default=False),
        qk_norm=layout == "qwen3",
    )  # fmt: skip
    shifted = fields.flag("shifted", default=name == DIFFULLAMA)
    if name == DIFFULLAMA:
        fields.choice("tie_word_embeddings", (False,), default=False)
        return DiffuLLaMA(fields, shape, shifted=shifted)
    model = Adapted(fields, shape, shifted=shifted)
    if fields.flag("tie_word_embeddings", default=False):
        model.tied = {"lm_head.weight": "model.embed_tokens.weight"}
    return model
