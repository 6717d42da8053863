"""LLaDA (Nie et al. 2025): Base, Instruct and 1.5, a Llama of OLMo's layout and a full mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdiff.backbones.layers.backbone import KeyValues, SequenceBackbone
from mdiff.backbones.layers.decoder import Matrix, Norm, Rotary, mask_of, mixed
from mdiff.backbones.layers.transformer import rotate
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

ARCHITECTURES = ("LLaDAModelLM",)
# What OLMo's code can do beside, and no LLaDA does.
UNUSED = (
    "alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias",
    "input_emb_norm", "multi_query_attention", "scale_logits", "weight_tying",
)  # fmt: skip


class _Block(nn.Module):
    """Attention, then the gated layer, under the files' names."""

    def __init__(
        self, width: int, inner: int, *, heads: int, key_heads: int, epsilon: float
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attn_norm, self.ff_norm = Norm(width, epsilon), Norm(width, epsilon)
        self.q_proj = Matrix(width, width)
        self.k_proj = Matrix(width, key_heads * self.head_width)
        self.v_proj = Matrix(width, key_heads * self.head_width)
        self.attn_out = Matrix(width, width)
        self.ff_proj, self.up_proj = Matrix(width, inner), Matrix(width, inner)
        self.ff_out = Matrix(inner, width)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], sees: Tensor | None, *,
        layer: int, cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """The stream (B, L, D) after both branches."""
        normal = self.attn_norm(x)
        query, key, value = (
            part(normal).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        # rope_full_precision: turned in float32 and then rounded.
        kind = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (table[:, None].to(kind) for table in tables)
        query, key = (rotate(part.to(kind), cos, sin).to(x.dtype) for part in (query, key))
        x = x + self.attn_out(mixed(query, key, value, sees, layer=layer, cache=cache))
        normal = self.ff_norm(x)
        result: Tensor = x + self.ff_out(F.silu(self.ff_proj(normal)) * self.up_proj(normal))
        return result


class LLaDA(SequenceBackbone):
    """The model of the files; see `llada`."""

    no_split: ClassVar[tuple[str, ...]] = ("_Block",)

    def __init__(self, described: Mapping[str, Any]) -> None:
        fields = Fields(described)
        _refuse_unused(fields)
        width, heads = fields.whole("d_model"), fields.whole("n_heads")
        given = described.get("n_kv_heads") is not None
        key_heads = fields.whole("n_kv_heads") if given else heads
        if width % (2 * heads) or heads % key_heads:
            raise CheckpointError(
                f"{fields.origin}: d_model={width}, n_heads={heads}, n_kv_heads={key_heads}: "
                "expected heads of one even width, and a divisor of them"
            )
        inner = fields.whole("mlp_hidden_size")
        # The table and the head may be longer than the vocabulary; logits have their columns.
        ids = fields.whole(
            "embedding_size" if described.get("embedding_size") is not None else "vocab_size",
            most=MOST_IDS,
        )
        epsilon = fields.number("rms_norm_eps", most=1.0)
        layers = fields.whole("n_layers", most=MOST_LAYERS)
        super().__init__(
            described, vocab_size=ids, mask_id=mask_of(fields, ids),
            window=fields.whole("max_sequence_length", most=MOST_IDS),
        )  # fmt: skip
        self.rotary = Rotary(fields.number("rope_theta", least=1))
        self.head_width = width // heads
        trunk = nn.ModuleDict({
            "wte": nn.Embedding(ids, width),
            "blocks": nn.ModuleList(
                _Block(width, inner, heads=heads, key_heads=key_heads, epsilon=epsilon)
                for _ in range(layers)
            ),
            "ln_f": Norm(width, epsilon),
            "ff_out": nn.Linear(width, ids, bias=False),
        })  # fmt: skip
        self.model = nn.ModuleDict({"transformer": trunk})

    @property
    def trunk(self) -> Any:
        """All modules, by the names of the files."""
        return self.model["transformer"]

    @property
    def head(self) -> nn.Module:  # type: ignore[override]
        """What makes logits (N, V) of the stream's rows (N, D)."""
        output: nn.Module = self.trunk["ff_out"]
        return output

    def stream(
        self, tokens: Tensor, positions: Tensor, sees: Tensor | None, *, t: Tensor | None,
        cache: KeyValues | None,
    ) -> Tensor:  # fmt: skip
        """The stream (B, L, D) behind the last norm."""
        x = self.trunk["wte"](tokens)
        tables = self.rotary.tables(positions, self.head_width)
        for number, block in enumerate(self.trunk["blocks"]):
            x = block(x, tables, sees, layer=number, cache=cache)
        result: Tensor = self.trunk["ln_f"](x)
        return result


def _refuse_unused(fields: Fields) -> None:
    """Raise CheckpointError for an option of OLMo's that changes the computation."""
    for name in UNUSED:
        if fields.described.get(name) is not None:
            fields.choice(name, (False,))
    fields.choice("activation_type", ("silu",))
    fields.choice("block_type", ("llama",))
    fields.choice("block_group_size", (1,), default=1)
    fields.choice("layer_norm_type", ("rms",))
    fields.choice("rope", (True,))
    fields.choice("rope_full_precision", (True,), default=True)


def llada(described: Mapping[str, Any]) -> LLaDA:
    """The model of a LLaDA config.json: full attention, row i predicts token i.

    RMS norms, rotary positions turned in float32, a gated layer of SiLU and no bias; the logits
    have `embedding_size` columns. Padding is not seen, on whichever side it stands: files
    before October 2025 came with code that ignored it.

    Raises CheckpointError for sizes out of range and for options that no LLaDA has.
    """
    return LLaDA(described)
