"""SMDM (Nie et al. 2024): the masked diffusion models in the layout of lit-gpt's TransEncoder.

Its files come without a config.json: one is the arguments of lit-gpt's Config, such as
{"name": "Diff_LLaMA_1028M", "n_embd": 1792, ...}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.backbone import KeyValues, SequenceBackbone
from mdiff.backbones.layers.transformer import rotate
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields
from mdiff.kernels.dense import attend

NAMED = "Diff_LLaMA"
KEYS = ("n_embd", "n_head", "n_layer")
BASE = 10_000


class RootNorm(nn.Module):
    """RMSNorm with a weight (D,), in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D), in its own type."""
        kind = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(kind), x.shape[-1:], self.weight.to(kind), self.epsilon).to(x.dtype)


class GroupAttention(nn.Module):
    """Attention whose one matrix holds, group by group, the queries, the key and the value."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.attn = nn.Linear(width, (heads + 2 * groups) * (width // heads), bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None) -> Tensor:
        """Each place's mix (B, L, D) of what it sees."""
        batch, length, width = x.shape
        each, size = self.heads // self.groups, width // self.heads
        qkv = self.attn(x).view(batch, length, self.groups, each + 2, size)
        cos, sin = (table[:, :, None, None] for table in tables)
        # The tables are in float32 and so are the products, as in the published kernel.
        turned = rotate(qkv[..., : each + 1, :].to(cos.dtype), cos, sin).to(x.dtype)
        query = turned[..., :each, :].flatten(2, 3).transpose(1, 2)
        key, value = (
            part.repeat_interleave(each, 2).transpose(1, 2)
            for part in (turned[..., each, :], qkv[..., each + 1, :])
        )
        mixed = attend(query, key, value, sees, causal=False)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Gated(nn.Module):
    """w3(silu(w1 x) * w2 x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x`."""
        result: Tensor = self.w3(F.silu(self.w1(x)) * self.w2(x))
        return result


class SMDMBlock(nn.Module):
    """Attention, then the gated layer, each behind a norm and added to the stream."""

    def __init__(self, width: int, heads: int, groups: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.norm_1 = RootNorm(width, epsilon)
        self.attn = GroupAttention(width, heads, groups)
        self.norm_2 = RootNorm(width, epsilon)
        self.mlp = nn.ModuleDict({"swiglu": Gated(width, inner)})

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None) -> Tensor:
        """The stream `x` (B, L, D) after this block."""
        x = x + self.attn(self.norm_1(x), tables, sees)
        result: Tensor = x + self.mlp["swiglu"](self.norm_2(x))
        return result


class SMDM(SequenceBackbone):
    """SMDM's transformer: one row of the embedding more than there are logits, for the mask."""

    no_split = ("SMDMBlock",)

    def __init__(
        self, described: Mapping[str, Any], *, vocab_size: int, width: int, layers: int,
        heads: int, groups: int, inner: int, epsilon: float, window: int, condensed: int,
    ) -> None:  # fmt: skip
        super().__init__(described, vocab_size=vocab_size, mask_id=vocab_size, window=window)
        self.size, self.condensed = width // heads, condensed
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        blocks = [SMDMBlock(width, heads, groups, inner, epsilon) for _ in range(layers)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size + 1, width),
                "h": nn.ModuleList(blocks),
                "ln_f": RootNorm(width, epsilon),
            }
        )

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """The map to logits."""
        return self.lm_head

    def stream(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, t: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads (B, L, D)."""
        x = self.transformer["wte"](tokens)
        tables = self._tables(positions)
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x, tables, sees)
        result: Tensor = self.transformer["ln_f"](x)
        return result

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The cos and signed sin (..., D) float32, rounded to bfloat16 as it was trained with."""
        powers = torch.arange(0, self.size, 2, device=positions.device) / self.size
        angles = (positions / self.condensed)[..., None] * (1.0 / BASE**powers)
        cos, sin = angles.cos().bfloat16().float(), angles.sin().bfloat16().float()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def recognises(described: Mapping[str, Any]) -> bool:
    """Whether these are lit-gpt's arguments of an SMDM model."""
    return str(described.get("name")).startswith(NAMED) and all(k in described for k in KEYS)


def smdm(described: Mapping[str, Any]) -> SMDM:
    """The model of lit-gpt's arguments; the mask id is the number of logit columns.

    Source: ML-GSAI/SMDM, lit_gpt/diffmodel.py, and the defaults of lit_gpt/config.py.
    """
    fields = Fields(described)
    fields.choice("_norm_class", ("FusedRMSNorm", "RMSNorm"), default="LayerNorm")
    fields.choice("_mlp_class", ("LLaMAMLP",), default="GptNeoxMLP")
    fields.choice("bias", (False,), default=True)
    fields.choice("parallel_residual", (False,), default=True)
    fields.choice("shared_attention_norm", (False,), default=False)
    fields.choice("rotary_percentage", (1.0,), default=0.25)
    width, heads = fields.whole("n_embd"), fields.whole("n_head")
    groups = fields.whole("n_query_groups", default=heads)
    if width % heads or heads % groups or width // heads % 2:
        raise CheckpointError(
            f"{fields.origin}: n_embd={width}, n_head={heads}, n_query_groups={groups}: expected "
            "each to divide the one before, in heads of an even width"
        )
    own = fields.whole("vocab_size", least=2, most=MOST_IDS, default=50254)
    multiple = fields.whole("padding_multiple", default=512)
    return SMDM(
        described,
        vocab_size=fields.whole(
            "padded_vocab_size", least=2, most=MOST_IDS, default=-(-own // multiple) * multiple
        ),
        width=width, layers=fields.whole("n_layer", most=MOST_LAYERS), heads=heads, groups=groups,
        inner=fields.whole("intermediate_size"),
        epsilon=fields.number("norm_eps", most=1.0, default=1e-5),
        window=fields.whole("block_size", most=MOST_IDS, default=4096),
        condensed=fields.whole("condense_ratio", default=1),
    )  # fmt: skip
