"""LLaDA (Nie et al. 2025): Base, Instruct, 1.5, iLLaDA; a Llama in OLMo's layout, a full mask."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from mdiff.backbones.layers.attention import Context, attention
from mdiff.backbones.layers.decoder import Decoder, Rotary, mask_of
from mdiff.backbones.layers.modules import Matrix, RootNorm
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

ARCHITECTURES = ("LLaDAModelLM",)
# What OLMo's code can do beside, and no LLaDA does.
UNUSED = (
    "alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "include_qkv_bias",
    "input_emb_norm", "multi_query_attention", "scale_logits",
)  # fmt: skip


class _Block(nn.Module):
    """Attention number `layer`, then the gated layer, under the files' names."""

    def __init__(
        self, width: int, inner: int, layer: int, *, heads: int, key_heads: int, epsilon: float
    ) -> None:
        super().__init__()
        self.layer, self.head_width = layer, width // heads
        self.attn_norm, self.ff_norm = RootNorm(width, epsilon), RootNorm(width, epsilon)
        self.q_proj = Matrix(width, width)
        self.k_proj = Matrix(width, key_heads * self.head_width)
        self.v_proj = Matrix(width, key_heads * self.head_width)
        self.attn_out = Matrix(width, width)
        self.ff_proj, self.up_proj = Matrix(width, inner), Matrix(width, inner)
        self.ff_out = Matrix(inner, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The stream (B, L, D) after both branches."""
        normal = self.attn_norm(x)
        query, key, value = (
            part(normal).unflatten(-1, (-1, self.head_width))
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        # rope_full_precision: rotated in float32 and then rounded.
        mixed = attention(query, key, value, context, layer=self.layer, wide=True)
        x = x + self.attn_out(mixed)
        normal = self.ff_norm(x)
        result: Tensor = x + self.ff_out(F.silu(self.ff_proj(normal)) * self.up_proj(normal))
        return result


class LLaDA(Decoder):
    """The model of a LLaDA config.json: full attention, row i predicts token i.

    RMS norms, rotary positions rotated in float32, a gated layer of SiLU and no bias; the logits
    have `embedding_size` columns. No position attends to padding, on whichever side it is: files
    before October 2025 came with code that ignored it.

    Raises CheckpointError for sizes out of range and for options that no LLaDA has.
    """

    no_split = ("_Block",)
    head_name = "model.transformer.ff_out"

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        for name in UNUSED:
            if described.get(name) is not None:
                fields.choice(name, (False,))
        fields.choice("activation_type", ("silu",))
        fields.choice("block_type", ("llama",))
        fields.choice("block_group_size", (1,), default=1)
        fields.choice("layer_norm_type", ("rms",))
        fields.choice("rope", (True,))
        fields.choice("rope_full_precision", (True,), default=True)
        width, heads = fields.whole("d_model"), fields.whole("n_heads")
        key_heads = fields.whole("n_kv_heads", default=heads)
        if width % (2 * heads) or heads % key_heads:
            raise CheckpointError(
                f"{fields.origin}: d_model={width}, n_heads={heads}, n_kv_heads={key_heads}: "
                "expected heads of one even width, and a divisor of them"
            )
        inner = fields.whole("mlp_hidden_size")
        # The table and the head may be longer than the vocabulary; logits have their columns.
        longer = described.get("embedding_size") is not None
        ids = fields.whole("embedding_size" if longer else "vocab_size", most=MOST_IDS)
        epsilon = fields.number("rms_norm_eps", most=1.0)
        layers = fields.whole("n_layers", most=MOST_LAYERS)
        super().__init__(
            described, vocab_size=ids, mask_id=mask_of(fields, ids),
            window=fields.whole("max_sequence_length", most=MOST_IDS),
        )  # fmt: skip
        self.rotary, self.rotated = Rotary.of(fields), width // heads
        trunk = nn.ModuleDict({
            "wte": nn.Embedding(ids, width),
            "blocks": nn.ModuleList(
                _Block(width, inner, n, heads=heads, key_heads=key_heads, epsilon=epsilon)
                for n in range(layers)
            ),
            "ln_f": RootNorm(width, epsilon),
            "ff_out": nn.Linear(width, ids, bias=False),
        })  # fmt: skip
        self.model = nn.ModuleDict({"transformer": trunk})
        if fields.flag("weight_tying", default=False):
            self.tied = {"model.transformer.ff_out.weight": "model.transformer.wte.weight"}

    def trunk(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The embedding, the layers and the last norm."""
        table, layers, norm, _ = self.model["transformer"].children()
        return table, layers, norm


llada = LLaDA
