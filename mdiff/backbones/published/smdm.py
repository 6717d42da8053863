"""SMDM (Nie et al. 2024): the masked diffusion models in the layout of lit-gpt's TransEncoder.

Its files come without a config.json: one is the arguments of lit-gpt's Config, such as
{"name": "Diff_LLaMA_1028M", "n_embd": 1792, ...}.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, Tables, attention, frequencies, tables_of
from mdiff.backbones.layers.backbone import Layout, SequenceBackbone
from mdiff.backbones.layers.modules import GatedMLP, RootNorm, unbiased
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

NAMED = "Diff_LLaMA"
KEYS = ("n_embd", "n_head", "n_layer")
BASE = 10_000


class GroupAttention(nn.Module):
    """Attention whose one matrix holds, group by group, the queries, the key and the value."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.groups, self.size = groups, width // heads
        self.attn = unbiased(width, (heads + 2 * groups) * self.size)
        self.proj = unbiased(width, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The attention output (B, L, D)."""
        qkv = self.attn(x).unflatten(-1, (self.groups, -1, self.size))
        query, key, value = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        # The products with the tables are in float32, as in the published kernel.
        result: Tensor = self.proj(attention(query, key, value, context, wide=True))
        return result


class SMDMBlock(nn.Module):
    """Attention, then the gated layer, each behind a norm and added to the stream."""

    def __init__(self, width: int, heads: int, groups: int, inner: int, epsilon: float) -> None:
        super().__init__()
        self.norm_1 = RootNorm(width, epsilon, wide_weight=True)
        self.attn = GroupAttention(width, heads, groups)
        self.norm_2 = RootNorm(width, epsilon, wide_weight=True)
        gated = GatedMLP(width, inner, names=("w1", "w2", "w3"), matrix=unbiased)
        self.mlp = nn.ModuleDict({"swiglu": gated})

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The stream `x` (B, L, D) after this block."""
        x = x + self.attn(self.norm_1(x), context)
        result: Tensor = x + self.mlp["swiglu"](self.norm_2(x))
        return result


class SMDM(SequenceBackbone):
    """SMDM's transformer: one row of the embedding more than there are logits, for the mask.

    Source: ML-GSAI/SMDM, lit_gpt/diffmodel.py, and the defaults of lit_gpt/config.py.
    """

    no_split = ("SMDMBlock",)

    def __init__(self, described: Mapping[str, object]) -> None:
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
                f"{fields.origin}: n_embd={width}, n_head={heads}, n_query_groups={groups}: "
                "expected each to divide the one before, in heads of an even width"
            )
        own = fields.whole("vocab_size", least=2, most=MOST_IDS, default=50254)
        multiple = fields.whole("padding_multiple", default=512)
        padded = -(-own // multiple) * multiple
        ids = fields.whole("padded_vocab_size", least=2, most=MOST_IDS, default=padded)
        layers, inner = fields.whole("n_layer", most=MOST_LAYERS), fields.whole("intermediate_size")
        epsilon = fields.number("norm_eps", most=1.0, default=1e-5)
        window = fields.whole("block_size", most=MOST_IDS, default=4096)
        super().__init__(described, vocab_size=ids, mask_id=ids, window=window)
        self.size, self.condensed = width // heads, fields.whole("condense_ratio", default=1)
        self.lm_head = unbiased(width, ids)
        blocks = [SMDMBlock(width, heads, groups, inner, epsilon) for _ in range(layers)]
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(ids + 1, width),
            "h": nn.ModuleList(blocks),
            "ln_f": RootNorm(width, epsilon, wide_weight=True),
        })  # fmt: skip

    def stream(self, tokens: Tensor, layout: Layout) -> Tensor:
        """What `head` reads (B, L, D)."""
        x = self.transformer["wte"](tokens)
        context = Context(self._tables(layout.positions), layout.mask)
        for block in self.transformer["h"].children():
            x = block(x, context)
        result: Tensor = self.transformer["ln_f"](x)
        return result

    def _tables(self, positions: Tensor) -> Tables:
        """The tables (..., D) float32, rounded to bfloat16 as it was trained with."""
        frequency = frequencies(self.size, BASE, positions.device)
        cos, sin = tables_of((positions / self.condensed)[..., None] * frequency)
        return cos.bfloat16().float(), sin.bfloat16().float()


def recognises(described: Mapping[str, object]) -> bool:
    """Whether these are lit-gpt's arguments of an SMDM model."""
    return str(described.get("name")).startswith(NAMED) and all(k in described for k in KEYS)


smdm = SMDM
