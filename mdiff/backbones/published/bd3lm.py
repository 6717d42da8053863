"""BD3LM (Arriola et al. 2025): block diffusion, kuleshov-group/bd3lm-owt-block_size4 and others."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdiff.backbones.published.mdlm import LEFT, MDLM
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, Fields

ARCHITECTURES = ("BD3LM",)


class BD3LM(MDLM):
    """MDLM's transformer with a block mask; its blocks are `block_size` long.

    With `time_conditioning` its noise level is sigma(t) = min(-ln(1 - t), ln 1000). The bounds of
    the clipped schedule, which the files hold, are of training and are only kept. `attn_backend`
    names one of two ways to compute the same. Source: kuleshov-group/bd3lms,
    models/hf/modeling_bd3lm.py in its sampling mode, and diffusion.py.
    """

    default_window = 1024

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        fields.choice("adaln", (True,), default=True)
        fields.choice("causal", (False,), default=False)
        fields.choice("cross_attn", (True,), default=True)
        fields.choice("attn_backend", ("sdpa", "flex"), default="flex")
        super().__init__(described)
        self.block_length: int | None = fields.whole("block_size", most=MOST_IDS, default=1)
        if self.window is not None and self.window % self.block_length:
            raise CheckpointError(
                f"{fields.origin}: model_length={self.window} is not a multiple of "
                f"block_size={self.block_length}"
            )
        if fields.flag("var_min", default=True):
            self.register_buffer("sampling_eps_min", torch.tensor(LEFT))
            self.register_buffer("sampling_eps_max", torch.tensor(1 - LEFT))

    def level(self, t: Tensor) -> Tensor:
        """The noise level sigma (B,) of t (B,), of the blocks that are being filled in."""
        return (-torch.log1p(-t)).clamp(max=-math.log(LEFT))


bd3lm = BD3LM
