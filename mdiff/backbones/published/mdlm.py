"""MDLM (Sahoo et al. 2024): kuleshov-group/mdlm-owt and what has its layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.adaln import Rotary, Sizes, Trunk
from mdiff.backbones.layers.backbone import KeyValues, SequenceBackbone
from mdiff.errors import ConfigError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

ARCHITECTURES = ("MDLM",)
# The class default of the published code, which a config that leaves it out means.
TOLD = 129
# What the log-linear schedule leaves unmasked at t = 1.
LEFT = 1e-3


class MDLM(SequenceBackbone):
    """MDLM's transformer. Without `time_conditioning` it is told the level 0 at all times.

    With it, it is told sigma(t) = -ln(1 - (1 - 0.001) t), the total noise of the log-linear
    schedule that all of its published checkpoints were trained with.
    """

    no_split = ("AdaLNBlock",)

    def __init__(
        self, described: Mapping[str, Any], sizes: Sizes, *, window: int, uses_time: bool
    ) -> None:
        super().__init__(
            described, vocab_size=sizes.vocab_size, mask_id=sizes.vocab_size - 1, window=window
        )
        self.uses_time = uses_time
        self.backbone = Trunk()
        self.backbone.build(sizes, Rotary(sizes.width // sizes.heads))

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The map to logits, with a bias."""
        return self.backbone.output_layer.linear

    def level(self, t: Tensor) -> Tensor:
        """The noise level sigma (B,) of t (B,)."""
        return -torch.log1p(-(1 - LEFT) * t)

    def stream(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, t: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads (B, L, D); ConfigError where the time is used and `t` is missing."""
        if not self.uses_time:
            level = torch.zeros(1, device=tokens.device)
        elif t is None:
            raise ConfigError("this model uses the time: call it with t=")
        else:
            level = self.level(t)
        return self.backbone.run(tokens, positions, sees, level=level, cache=cache)


def sizes_of(fields: Fields) -> Sizes:
    """The sizes by the names that MDLM and BD3LM give them."""
    return Sizes(
        vocab_size=fields.whole("vocab_size", least=2, most=MOST_IDS),
        width=fields.whole("hidden_dim"),
        layers=fields.whole("n_blocks", most=MOST_LAYERS),
        heads=fields.whole("n_heads"),
        told=fields.whole("cond_dim", default=TOLD),
    )


def mdlm(described: Mapping[str, Any]) -> MDLM:
    """The model of a config.json; its mask is the last id.

    Source: kuleshov-group/mdlm, models/dit.py and noise_schedule.py.
    """
    fields = Fields(described)
    return MDLM(
        described, sizes_of(fields), window=fields.whole("model_length", most=MOST_IDS),
        uses_time=fields.flag("time_conditioning", default=False),
    )  # fmt: skip
