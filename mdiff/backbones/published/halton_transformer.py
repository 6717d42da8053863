"""The transformer of Halton-MaskGIT (Besnier et al. 2025): `Network/transformer.py`.

config.json holds the constructor's arguments: input_size (places a side), hidden_dim,
codebook_size, depth, heads, mlp_dim, nclass, register. Every block is modulated by the class
(DiT), queries and keys are normalised over the whole width without a weight, and register
tokens follow the canvas. The head has a column for the mask id, which is never generated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.backbone import Backbone, KeyValues
from mdiff.backbones.layers.grid import class_of, grid_layout
from mdiff.backbones.layers.transformer import modulated
from mdiff.denoiser import Condition
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields
from mdiff.kernels.dense import attend

ARCHITECTURES = ("HaltonTransformer",)
EPSILON = 1e-5
# The gated inner width is rounded up to a multiple of this.
MULTIPLE = 256
MOST_SIDE, MOST_REGISTERS = 512, 1024


class Norm(nn.Module):
    """x / sqrt(mean x^2 + 1e-5) * weight (+ bias), in float32."""

    def __init__(self, width: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D)."""
        normal = self.weight * unit(x)
        return normal if self.bias is None else normal + self.bias


def unit(x: Tensor) -> Tensor:
    """The rows (..., D) with a mean square of 1."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=EPSILON).to(x.dtype)


class Attention(nn.Module):
    """Attention whose queries and keys are normalised before they are split into heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # Where the heads do not divide the width, the rest of it is left out.
        inside = width // heads * heads
        self.heads = heads
        self.wq, self.wk, self.wv = (nn.Linear(width, inside, bias=False) for _ in range(3))
        self.wo = nn.Linear(inside, width, bias=False)

    def forward(self, x: Tensor, sees: Tensor | None) -> Tensor:
        """(B, L, D); `sees` (B, 1, L, L) bool or None."""
        rows = unit(self.wq(x)), unit(self.wk(x)), self.wv(x)
        query, key, value = (
            each.view(*each.shape[:2], self.heads, -1).transpose(1, 2) for each in rows
        )
        mixed = attend(query, key, value, sees, causal=False)
        result: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D)."""
        result: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return result


class Block(nn.Module):
    """Attention and a gated feed-forward, shifted, scaled and gated by the class."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.ln1, self.ln2 = Norm(width), Norm(width)
        self.attn = Attention(width, heads)
        self.ff = FeedForward(width, inner)

    def forward(self, x: Tensor, told: Tensor, sees: Tensor | None) -> Tensor:
        """(B, L, D); `told` (B, 1, D)."""
        shift, scale, gate, shift_, scale_, gate_ = self.mlp(told).chunk(6, dim=-1)
        x = x + gate * self.attn(modulated(self.ln1(x), shift, scale), sees)
        result: Tensor = x + gate_ * self.ff(modulated(self.ln2(x), shift_, scale_))
        return result


class Transformer(nn.Module):
    """The blocks, one after another."""

    def __init__(self, width: int, depth: int, heads: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads, inner) for _ in range(depth))

    def forward(self, x: Tensor, told: Tensor, sees: Tensor | None) -> Tensor:
        """(B, L, D); `told` (B, 1, D)."""
        for block in self.layers:
            x = block(x, told, sees)
        return x


class LastNorm(nn.Module):
    """The norm before the head, shifted and scaled by the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = Norm(width, has_bias=True)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """(B, L, D); `told` (B, 1, D)."""
        shift, scale = self.mlp(told).chunk(2, dim=-1)
        return modulated(self.norm_final(x), shift, scale)


class HaltonTransformer(Backbone):
    """The denoiser; see `halton_transformer`. cond {"label": (B,)}; `classes` says none."""

    tied: Mapping[str, str] = {"head.weight": "tok_emb.weight"}
    no_split: ClassVar[tuple[str, ...]] = ("Block",)
    codes_per_position = 1

    def __init__(
        self, described: Mapping[str, Any], *, side: int, width: int, codebook_size: int,
        depth: int, heads: int, inner: int, classes: int, registers: int,
    ) -> None:  # fmt: skip
        super().__init__(
            described, vocab_size=codebook_size + 1, mask_id=codebook_size, window=side**2
        )
        self.latent_grid, self.classes = (side, side), classes
        self.cls_emb = nn.Embedding(classes + 1, width)
        self.tok_emb = nn.Embedding(codebook_size + 1, width)
        self.pos_emb = nn.Embedding(side**2, width)
        self.transformer = Transformer(width, depth, heads, inner)
        self.last_norm = LastNorm(width)
        self.head = nn.Linear(width, codebook_size + 1)
        self.reg_tokens = nn.Embedding(registers, width) if registers else None

    def hidden(
        self, tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None,
        t: Tensor | None, cond: Condition | None, cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads (B, L, D); ConfigError for what the model cannot be given."""
        label = class_of(cond, tokens, classes=self.classes)
        registers = 0 if self.reg_tokens is None else self.reg_tokens.num_embeddings
        positions, sees = grid_layout(
            tokens, valid=valid, documents=documents, cache=cache,
            window=self.pos_emb.num_embeddings, extra=registers,
        )  # fmt: skip
        told = self.cls_emb(label)[:, None]
        length = tokens.shape[1]
        x = self.tok_emb(tokens) + self.pos_emb(positions)
        if self.reg_tokens is not None:
            x = torch.cat([x, self.reg_tokens.weight.expand(len(x), -1, -1)], 1)
        x = self.transformer(x, told, sees)
        result: Tensor = self.last_norm(x[:, :length], told)
        return result


def recognises(described: Mapping[str, Any]) -> bool:
    """Whether these are the transformer's arguments."""
    return {"register", "input_size", "nclass", "mlp_dim"} <= set(described)


def halton_transformer(described: Mapping[str, Any]) -> HaltonTransformer:
    """The denoiser of the transformer's arguments; CheckpointError for what is not supported.

    Its canvas is the grid of input_size x input_size places, row by row.
    """
    fields = Fields(described)
    fields.choice("proj", (1,), default=1)
    fields.choice("tome_keep_ratio", (1, 1.0), default=1)
    width, heads = fields.whole("hidden_dim"), fields.whole("heads")
    if heads > width:
        raise CheckpointError(f"config.json: heads={heads}: more than hidden_dim={width}")
    gated = 2 * fields.whole("mlp_dim") // 3
    return HaltonTransformer(
        described, side=fields.whole("input_size", most=MOST_SIDE), width=width,
        codebook_size=fields.whole("codebook_size", most=MOST_IDS),
        depth=fields.whole("depth", most=MOST_LAYERS), heads=heads,
        inner=max(1, -(-gated // MULTIPLE)) * MULTIPLE,
        classes=fields.whole("nclass", most=MOST_IDS),
        registers=fields.whole("register", least=0, most=MOST_REGISTERS),
    )  # fmt: skip
