"""Dream (Ye et al. 2025) and its kin of the same files: Dream-Coder, DiffuCoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mdiff.backbones.layers.decoder import LlamaDecoder, Shape
from mdiff.errors import ConfigError
from mdiff.files import Fields

ARCHITECTURES = ("DreamModel",)


class Dream(LlamaDecoder):
    """The model of the files; see `dream`."""


def dream(described: Mapping[str, object]) -> Dream:
    """The model of a Dream config.json: Qwen2.5's layers, a full mask, the logits shifted.

    Raises CheckpointError for sizes out of range, and for a sliding window or tied embeddings,
    which no Dream has.
    """
    fields = Fields(described)
    fields.choice("use_sliding_window", (False,), default=False)
    fields.choice("tie_word_embeddings", (False,), default=False)
    # Dream's own code has another default than the number that follows from the width.
    fields.whole("num_key_value_heads")
    return Dream(fields, Shape.of(fields, qkv_bias=True), shifted=True)


def dream_counts(hidden: Tensor, *, steps: int, epsilon: float = 1e-3) -> Tensor:
    """How many positions each sample reveals at each step of Dream's code, (B, steps) int64.

    Of n positions left int(n (1 - s / t)) are written, t falling evenly from 1 to `epsilon` in
    float32 and s the next; the last step writes all. A step may write none: its call is left
    out here. Dream takes n as the mean of the batch; here a sample's own `hidden` (B,) counts, so
    that the rest of the batch changes nothing.

    Raises ConfigError for steps < 1.

    >>> dream_counts(torch.tensor([12]), steps=5).tolist()
    [[2, 2, 2, 2, 4]]
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: need at least 1")
    times = torch.linspace(1, epsilon, steps + 1)
    left, table = hidden.clone(), []
    for step in range(steps):
        share = 1 - times[step + 1] / times[step]
        count = left if step == steps - 1 else (left.float() * share.to(left.device)).long()
        table.append(count)
        left = left - count
    return torch.stack(table, 1)
