"""Nemotron-Labs-Diffusion (NVIDIA 2026): Ministral's layers, as a diffusion and a causal model."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from mdiff.backbones.layers.attention import block_mask
from mdiff.backbones.layers.decoder import LlamaDecoder, Shape
from mdiff.backbones.layers.moe import only
from mdiff.files import MOST_IDS, Fields

ARCHITECTURES = ("NemotronLabsDiffusionModel",)
# "bidirectional" is how the published models are sampled, "block_diff" how they are trained.
PARADIGMS = ("bidirectional", "block_diff", "autoregressive")
BLOCK_LENGTH = 32


class Nemotron(LlamaDecoder):
    """Blocks before one that is being written are read causally; it attends to all of itself.

    A complete block is causal, and its last row predicts the first token of the next. So a
    `block_length` of 1 is the autoregressive model, and None one full mask. With `block_causal`
    complete blocks attend to all of themselves too, and no row is of the block before.
    """

    head_name = "diffusion_head"
    block_length: int | None
    block_causal = False

    def __init__(self, fields: Fields, shape: Shape) -> None:
        super().__init__(fields, shape, shifted=False)
        self.encoder, self.diffusion_head = self.model, self.lm_head
        del self.model, self.lm_head

    def trunk(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The embedding, the layers and the last norm."""
        table, layers, norm = self.encoder.children()
        return table, layers, norm

    def limited(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, *, kept: int
    ) -> Tensor | None:
        """See `SequenceBackbone.limited`; what a cache keeps is complete."""
        block = self.block_length
        if block is None or self.block_causal:
            return mask if block is None else block_mask(positions, mask, block, kept=kept)
        own = positions // block
        same = own[:, :, None] == own[:, None, :]
        inside = same if mask is None else same & mask[:, 0]
        hidden = tokens.eq(-1 if self.mask_id is None else self.mask_id)
        growing = (inside & hidden[:, None, :]).any(2, keepdim=True)
        attends = (positions[:, None, :] <= positions[:, :, None]) | (same & growing)
        every = F.pad(attends, (kept, 0), value=True)[:, None]
        return every if mask is None else every & mask


def nemotron_labs_diffusion(described: Mapping[str, object]) -> Nemotron:
    """The model of a config.json; CheckpointError for what is absurd or not supported."""
    fields = Fields(described)
    fields.choice("tie_word_embeddings", (False,), default=False)
    only(fields, "sliding_window")
    paradigm = fields.choice("dlm_paradigm", PARADIGMS, default="bidirectional")
    bias = fields.flag("attention_bias", default=False)
    shape = Shape.of(
        fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", default=False)
    )
    model = Nemotron(fields, shape)
    model.block_length = fields.whole("block_size", most=MOST_IDS, default=BLOCK_LENGTH)
    if paradigm == "autoregressive":
        model.block_length = 1
    model.block_causal = paradigm == "block_diff"
    model.block_seed = not model.block_causal
    return model
