"""MDLM (Sahoo et al. 2024): kuleshov-group/mdlm-owt and what has its layout.

So have the students of SDTT (Deschenaux & Gulcehre 2025) and Duo (Sahoo et al. 2025), whose noise
is uniform. SDTT's files name no architecture: "SDTT" or "MDLM" is to be written into a config.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mdiff.backbones.layers.adaln import Rotary, Sizes, Trunk
from mdiff.backbones.layers.backbone import Layout, SequenceBackbone
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields
from mdiff.process import Uniform

ARCHITECTURES = ("MDLM", "SDTT", "DUO")
# The class default of the published code, which a config that leaves it out means.
CONDITION_WIDTH = 129
# What the log-linear schedule leaves unmasked at t = 1.
LEFT = 1e-3


class MDLM(SequenceBackbone):
    """MDLM's transformer. Without `time_conditioning` its noise level is 0 at all times.

    With it, the level is sigma(t) = -ln(1 - (1 - 0.001) t), the total noise of the log-linear
    schedule that all of its published checkpoints were trained with. The mask is the last id.
    Source: kuleshov-group/mdlm, models/dit.py and noise_schedule.py.
    """

    no_split = ("AdaLNBlock",)
    head_name = "backbone.output_layer.linear"
    # The window of a config that leaves it out.
    default_window: ClassVar[int | None] = None

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        sizes = Sizes(
            vocab_size=fields.whole("vocab_size", least=2, most=MOST_IDS),
            width=fields.whole("hidden_dim"),
            layers=fields.whole("n_blocks", most=MOST_LAYERS),
            heads=fields.whole("n_heads"),
            condition_width=fields.whole("cond_dim", default=CONDITION_WIDTH),
        )
        window = fields.whole("model_length", most=MOST_IDS, default=self.default_window)
        super().__init__(
            described, vocab_size=sizes.vocab_size, mask_id=sizes.vocab_size - 1, window=window
        )
        self.uses_time = fields.flag("time_conditioning", default=False)
        if described.get("architectures") == ["DUO"]:
            fields.choice("causal", (False,), default=False)
            # No id is a mask, nor does one reach the model: the noise begins with random tokens.
            self.uses_time, self.mask_id, self.noise = True, sizes.vocab_size, "uniform"
            self.process, self.predicts = Uniform(), "leave_one_out"
        self.backbone = Trunk()
        self.backbone.build(sizes, Rotary(sizes.width // sizes.heads))

    def level(self, t: Tensor) -> Tensor:
        """The noise level sigma (B,) of t (B,)."""
        return -torch.log1p(-(1 - LEFT) * t)

    def stream(self, tokens: Tensor, layout: Layout) -> Tensor:
        """What `head` reads (B, L, D); ConfigError where the time is used and `t` is missing."""
        none = torch.zeros(1, device=tokens.device)
        level = self.level(self.time_of(layout)) if self.uses_time else none
        return self.backbone.run(tokens, layout, level=level)


mdlm = MDLM
