"""The transformer of MDLM, BD3LM and GIDD: adaLN of the noise level, with rotary positions.

Names and shapes are those of the published files (Sahoo et al. 2024, models/dit.py, after
Peebles & Xie 2023). All norms are LayerNorm with a weight and no bias, in float32.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, Tables, attention, frequencies, tables_of
from mdiff.backbones.layers.backbone import Layout
from mdiff.backbones.layers.modules import drawn, modulated
from mdiff.errors import CheckpointError

# Width of the sinusoids of a noise level, and their longest period over 2 pi.
WAVES, LONGEST = 256, 10_000
# The inner width of the two-layer network over that of the stream.
WIDENING = 4


@dataclass(frozen=True)
class Sizes:
    """`condition_width` is the width of the embedded noise level."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    condition_width: int

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise CheckpointError(
                f"{self.heads} heads of a width of {self.width}: expected an even width each"
            )


class Norm(nn.Module):
    """LayerNorm with a weight (D,) alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D), in its own type."""
        kind = torch.promote_types(x.dtype, torch.float32)
        normal = F.layer_norm(x.to(kind), x.shape[-1:])
        return (normal * self.weight.to(kind)).to(x.dtype)


class Embedding(nn.Module):
    """One row (D,) an id."""

    def __init__(self, ids: int, width: int) -> None:
        super().__init__()
        self.embedding = drawn(ids, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows (B, L, D) of tokens (B, L)."""
        return F.embedding(tokens, self.embedding)


class LevelEmbedding(nn.Module):
    """The condition (B, C) of the blocks, from a noise level (B,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        """silu(MLP([cos, sin](level * 10000^(-k / 128)))), sinusoids in float32."""
        half = WAVES // 2
        powers = torch.arange(half, dtype=torch.float32, device=level.device) / half
        angles = level.float()[:, None] * torch.exp(-math.log(LONGEST) * powers)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        return F.silu(self.mlp(waves.to(next(self.mlp.parameters()).dtype)))


class Rotary(nn.Module):
    """Rotary frequencies (D / 2,), which the files hold too."""

    inv_freq: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", frequencies(size, LONGEST))

    def forward(self, positions: Tensor) -> Tables:
        """The tables (..., D) float32 of positions (...)."""
        return tables_of(positions[..., None].float() * self.inv_freq.float())


class AdaLNBlock(nn.Module):
    """Attention number `layer`, then two layers with GELU, each shifted, scaled and gated."""

    def __init__(self, sizes: Sizes, layer: int) -> None:
        super().__init__()
        width = sizes.width
        self.heads, self.layer = sizes.heads, layer
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, WIDENING * width), nn.GELU(approximate="tanh"),
            nn.Linear(WIDENING * width, width),
        )  # fmt: skip
        self.adaLN_modulation = nn.Linear(sizes.condition_width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, context: Context) -> Tensor:
        """The stream `x` (B, L, D) after this block; `condition` (1 or B, C)."""
        six = self.adaLN_modulation(condition)[:, None].chunk(6, -1)
        h = modulated(self.norm1(x), *six[:2])
        query, key, value = self.attn_qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed = attention(query, key, value, context, layer=self.layer)
        x = x + six[2] * self.attn_out(mixed)
        result: Tensor = x + six[5] * self.mlp(modulated(self.norm2(x), *six[3:5]))
        return result


class Output(nn.Module):
    """The last norm, shifted and scaled; `linear`, with its bias, is the head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm_final = Norm(sizes.width)
        self.linear = nn.Linear(sizes.width, sizes.vocab_size)
        self.adaLN_modulation = nn.Linear(sizes.condition_width, 2 * sizes.width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """What the head reads (B, L, D)."""
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, -1)
        return modulated(self.norm_final(x), shift, scale)


class Trunk(nn.Module):
    """The whole network, either a module of a model or, built into one, its own layers."""

    def build(self, sizes: Sizes, rotary: nn.Module) -> None:
        """Make the layers; `rotary` makes tables of positions."""
        self.vocab_embed = Embedding(sizes.vocab_size, sizes.width)
        self.sigma_map = LevelEmbedding(sizes.condition_width)
        self.rotary_emb = rotary
        self.blocks = nn.ModuleList(AdaLNBlock(sizes, n) for n in range(sizes.layers))
        self.output_layer = Output(sizes)

    def run(self, tokens: Tensor, layout: Layout, *, level: Tensor) -> Tensor:
        """What the head reads (B, L, D) at noise level (1 or B,)."""
        x = self.vocab_embed(tokens)
        condition = self.sigma_map(level)
        context = Context(self.rotary_emb(layout.positions), layout.mask, layout.cache)
        for block in self.blocks:
            x = block(x, condition, context)
        result: Tensor = self.output_layer(x, condition)
        return result
