"""The transformer of MDLM, BD3LM and GIDD: adaLN told of the noise level, with rotary positions.

Names and shapes are those of the published files (Sahoo et al. 2024, models/dit.py, after
Peebles & Xie 2023). All norms are LayerNorm with a weight and no bias, in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.backbone import KeyValues
from mdiff.backbones.layers.transformer import modulated, rotate
from mdiff.errors import CheckpointError
from mdiff.kernels.dense import attend

Tables = tuple[Tensor, Tensor]

# Width of the sinusoids of a noise level, and their longest period over 2 pi.
WAVES, LONGEST = 256, 10_000
# The inner width of the two-layer network over that of the stream.
WIDENING = 4


@dataclass(frozen=True)
class Sizes:
    """`told` is the width of what adaLN reads of the noise level."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    told: int

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
        self.embedding = nn.Parameter(torch.empty(ids, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """The rows (B, L, D) of tokens (B, L)."""
        return F.embedding(tokens, self.embedding)


class LevelEmbedding(nn.Module):
    """What the blocks are told of a noise level (B,): (B, C)."""

    def __init__(self, told: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WAVES, told), nn.SiLU(), nn.Linear(told, told))

    def forward(self, level: Tensor) -> Tensor:
        """silu(MLP([cos, sin](level * 10000^(-k / 128)))), sinusoids in float32."""
        half = WAVES // 2
        powers = torch.arange(half, dtype=torch.float32, device=level.device) / half
        angles = level.float()[:, None] * torch.exp(-math.log(LONGEST) * powers)
        waves = torch.cat([angles.cos(), angles.sin()], -1)
        first: nn.Linear = self.mlp[0]  # type: ignore[assignment]
        return F.silu(self.mlp(waves.to(first.weight.dtype)))


class Rotary(nn.Module):
    """Rotary frequencies (D / 2,), which the files hold."""

    inv_freq: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.empty(size // 2))

    def forward(self, positions: Tensor) -> Tables:
        """The cos and signed sin (..., D) float32 of positions (...), for `rotate`."""
        angles = positions[..., None].float() * self.inv_freq.float()
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


class AdaLNBlock(nn.Module):
    """Attention, then two layers with GELU, each shifted, scaled and gated by what is told."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, WIDENING * width), nn.GELU(approximate="tanh"),
            nn.Linear(WIDENING * width, width),
        )  # fmt: skip
        self.adaLN_modulation = nn.Linear(sizes.told, 6 * width)

    def forward(
        self, x: Tensor, told: Tensor, tables: Tables, sees: Tensor | None, layer: int,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """The stream `x` (B, L, D) after this block; `told` (1 or B, C)."""
        first_shift, first_scale, first_gate, shift, scale, gate = self.adaLN_modulation(told)[
            :, None
        ].chunk(6, -1)
        h = modulated(self.norm1(x), first_shift, first_scale)
        x = x + first_gate * self._attention(h, tables, sees, layer, cache)
        result: Tensor = x + gate * self.mlp(modulated(self.norm2(x), shift, scale))
        return result

    def _attention(
        self, x: Tensor, tables: Tables, sees: Tensor | None, layer: int, cache: KeyValues | None
    ) -> Tensor:
        batch, length, width = x.shape
        qkv = self.attn_qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        cos, sin = (table[:, :, None, None].to(x.dtype) for table in tables)
        query, key = rotate(qkv[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4).unbind()
        value = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            key, value = cache.joined(layer, key, value)
        mixed = attend(query, key, value, sees, causal=False)
        result: Tensor = self.attn_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Output(nn.Module):
    """The last norm, shifted and scaled; `linear`, with its bias, is the head."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm_final = Norm(sizes.width)
        self.linear = nn.Linear(sizes.width, sizes.vocab_size)
        self.adaLN_modulation = nn.Linear(sizes.told, 2 * sizes.width)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """What the head reads (B, L, D)."""
        shift, scale = self.adaLN_modulation(told)[:, None].chunk(2, -1)
        return modulated(self.norm_final(x), shift, scale)


class Trunk(nn.Module):
    """The whole network, either a module of a model or, built into one, its own layers."""

    def build(self, sizes: Sizes, rotary: nn.Module) -> None:
        """Make the layers; `rotary` turns positions into tables."""
        self.vocab_embed = Embedding(sizes.vocab_size, sizes.width)
        self.sigma_map = LevelEmbedding(sizes.told)
        self.rotary_emb = rotary
        self.blocks = nn.ModuleList(AdaLNBlock(sizes) for _ in range(sizes.layers))
        self.output_layer = Output(sizes)

    def run(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, level: Tensor,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What the head reads (B, L, D) at noise level (1 or B,)."""
        x = self.vocab_embed(tokens)
        told = self.sigma_map(level)
        tables = self.rotary_emb(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, told, tables, sees, layer, cache)
        result: Tensor = self.output_layer(x, told)
        return result
