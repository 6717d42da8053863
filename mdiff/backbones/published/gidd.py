"""GIDD (von Rütte et al. 2025): masked, or masked and uniform, diffusion; dvruette/gidd-*."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.adaln import LONGEST, Sizes, Trunk
from mdiff.backbones.layers.attention import Tables, frequencies
from mdiff.backbones.layers.backbone import Layout, SequenceBackbone
from mdiff.errors import ConfigError
from mdiff.files import MOST_IDS, MOST_LAYERS, MOST_WIDTH, Fields
from mdiff.process import Mixed

ARCHITECTURES = ("DIT",)
# Of random tokens alone the published process has no form.
MOST_RANDOM = 0.999
# The tables of query, key and value.
KINDS = 3


class StoredRotary(nn.Module):
    """The rotary tables (1, L, 3, 1, D) of all positions, which the files hold."""

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies(size, LONGEST)
        angles = torch.cat([angles, angles], 1)[None, :, None, None].repeat(1, 1, KINDS, 1, 1)
        # Values are not rotated.
        angles[:, :, KINDS - 1] = 0
        self.register_buffer("cos_cached", angles.cos())
        self.register_buffer("sin_cached", angles.sin())

    def forward(self, positions: Tensor) -> Tables:
        """The cos and signed sin (..., D) of positions (...) below L, for `rotate`."""
        cos, sin = self.cos_cached[0, :, 0, 0][positions], self.sin_cached[0, :, 0, 0][positions]
        below, above = sin.chunk(2, -1)
        return cos, torch.cat([-below, above], -1)


class GIDD(Trunk, SequenceBackbone):
    """MDLM's transformer, conditioned on t itself, inside [t_eps, 1 - t_eps] as in training.

    With `p_uniform` above 0 the noise also writes random tokens and every position is predicted, by
    the ratio form of its bound without the token itself. The mask is the last id. Source:
    dvruette/gidd, models/modeling_dit.py, and the defaults of configuration_dit.py.
    """

    no_split = ("AdaLNBlock",)
    head_name = "output_layer.linear"
    uses_time = True

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        window = fields.whole("max_seq_len", most=MOST_IDS, default=1024)
        sizes = Sizes(
            vocab_size=fields.whole("vocab_size", least=2, most=MOST_IDS, default=50258),
            width=fields.whole("hidden_size", most=MOST_WIDTH, default=768),
            layers=fields.whole("num_hidden_layers", most=MOST_LAYERS, default=12),
            heads=fields.whole("num_attention_heads", default=12),
            condition_width=fields.whole("timestep_cond_dim", default=128),
        )
        SequenceBackbone.__init__(
            self, described, vocab_size=sizes.vocab_size, mask_id=sizes.vocab_size - 1,
            window=window,
        )  # fmt: skip
        self.longest, self.edge = window, fields.number("t_eps", most=0.5, default=1e-4)
        p_uniform = fields.number("p_uniform", most=MOST_RANDOM, default=0.0)
        if p_uniform > 0:
            self.noise = "mask and uniform"
            self.process, self.predicts = Mixed(p_uniform=p_uniform), "leave_one_out"
        self.build(sizes, StoredRotary(window, sizes.width // sizes.heads))

    def stream(self, tokens: Tensor, layout: Layout) -> Tensor:
        """What `head` reads (B, L, D); ConfigError without `t` or for too long a canvas."""
        t = self.time_of(layout)
        if tokens.shape[1] > self.longest:
            raise ConfigError(f"{tokens.shape[1]} tokens: this model has {self.longest} positions")
        return self.run(tokens, layout, level=t.clamp(self.edge, 1 - self.edge))


gidd = GIDD
