"""BD3LM (Arriola et al. 2025): block diffusion, kuleshov-group/bd3lm-owt-block_size4 and others."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mdiff.backbones.layers.adaln import Sizes
from mdiff.backbones.published.mdlm import LEFT, MDLM, sizes_of
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, Fields

ARCHITECTURES = ("BD3LM",)


class BD3LM(MDLM):
    """MDLM's transformer with a block mask.

    With `time_conditioning` its noise level is sigma(t) = min(-ln(1 - t), ln 1000). The bounds of
    the clipped schedule, which the files hold, are of training and are only kept.
    """

    def __init__(
        self, described: Mapping[str, object], sizes: Sizes, *, window: int, block_length: int,
        clipped: bool, uses_time: bool,
    ) -> None:  # fmt: skip
        super().__init__(described, sizes, window=window, uses_time=uses_time)
        self.block_length: int | None = block_length
        if clipped:
            self.register_buffer("sampling_eps_min", torch.tensor(LEFT))
            self.register_buffer("sampling_eps_max", torch.tensor(1 - LEFT))

    def level(self, t: Tensor) -> Tensor:
        """The noise level sigma (B,) of t (B,), of the blocks that are being filled in."""
        return (-torch.log1p(-t)).clamp(max=-math.log(LEFT))


def bd3lm(described: Mapping[str, object]) -> BD3LM:
    """The model of a config.json; its mask is the last id, its blocks are `block_size` long.

    `attn_backend` names one of two ways to compute the same. Source: kuleshov-group/bd3lms,
    models/hf/modeling_bd3lm.py in its sampling mode, and diffusion.py.
    """
    fields = Fields(described)
    fields.choice("adaln", (True,), default=True)
    fields.choice("causal", (False,), default=False)
    fields.choice("cross_attn", (True,), default=True)
    fields.choice("attn_backend", ("sdpa", "flex"), default="flex")
    window = fields.whole("model_length", most=MOST_IDS, default=1024)
    block_length = fields.whole("block_size", most=MOST_IDS, default=1)
    if window % block_length:
        raise CheckpointError(
            f"{fields.origin}: model_length={window} is not a multiple of block_size={block_length}"
        )
    return BD3LM(
        described, sizes_of(fields), window=window, block_length=block_length,
        clipped=fields.flag("var_min", default=True),
        uses_time=fields.flag("time_conditioning", default=False),
    )  # fmt: skip
