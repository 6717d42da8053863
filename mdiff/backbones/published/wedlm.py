"""WeDLM (Tencent 2025): a causal Qwen whose written tokens are moved before the hidden ones."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mdiff.backbones.layers.decoder import LlamaDecoder
from mdiff.backbones.published.adapted import shape_of
from mdiff.files import MOST_IDS, Fields

ARCHITECTURES = ("WeDLMForCausalLM",)
# Of a block, which its attention does not depend on; its config.json says none.
BLOCK_LENGTH = 16


class WeDLM(LlamaDecoder):
    """A hidden position attends to all written ones and to the hidden ones before it.

    A written one attends to the written ones before it: what causal attention is over the written
    tokens and then the hidden ones, each with its own position. Row i predicts token i.
    """

    block_length: int | None

    def limited(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, *, kept: int
    ) -> Tensor | None:
        """See `SequenceBackbone.limited`; what a cache keeps is all written."""
        hidden = tokens.eq(-1 if self.mask_id is None else self.mask_id)
        before = positions[:, None, :] <= positions[:, :, None]
        written = ~hidden[:, None, :]
        attends = torch.where(hidden[:, :, None], before | written, before & written)
        every = F.pad(attends, (kept, 0), value=True)[:, None]
        cut = super().limited(tokens, positions, mask, kept=kept)
        return every if cut is None else every & cut


def wedlm(described: Mapping[str, object]) -> WeDLM:
    """The model of a WeDLM config.json, under Qwen3's names or, without `qk_norm`, Qwen2's.

    Raises CheckpointError for sizes out of range and for a sliding window.
    """
    fields = Fields(described)
    shape = shape_of(fields, "qwen3" if fields.flag("qk_norm") else "qwen2")
    bias = fields.flag("attention_bias", default=True)
    model = WeDLM(fields, replace(shape, qkv_bias=bias, out_bias=False), shifted=False)
    model.block_length = fields.whole("block_size", most=MOST_IDS, default=BLOCK_LENGTH)
    return model
