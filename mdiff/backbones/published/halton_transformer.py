"""The transformer of Halton-MaskGIT (Besnier et al. 2025): `Network/transformer.py`.

config.json holds the constructor's arguments: input_size (positions a side), hidden_dim,
codebook_size, depth, heads, mlp_dim, nclass, register. Every block is modulated by the class
(DiT), queries and keys are normalised over the whole width without a weight, and register
tokens follow the canvas. The head has a column for the mask id, which is never generated.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, attention
from mdiff.backbones.layers.backbone import Backbone, Call
from mdiff.backbones.layers.grid import class_of, grid_layout
from mdiff.backbones.layers.modules import GatedMLP, RootNorm, modulated, root_normal, unbiased
from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

ARCHITECTURES = ("HaltonTransformer",)
EPSILON = 1e-5
# The gated inner width is rounded up to a multiple of this.
MULTIPLE = 256
MOST_SIDE, MOST_REGISTERS = 512, 1024


class Attention(nn.Module):
    """Attention whose queries and keys are normalised before they are split into heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # Where the heads do not divide the width, the rest of it is left out.
        inside = width // heads * heads
        self.heads = heads
        self.wq, self.wk, self.wv = (unbiased(width, inside) for _ in range(3))
        self.wo = unbiased(inside, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The attention output (B, L, D)."""
        unit = (root_normal(matrix(x), EPSILON).to(x.dtype) for matrix in (self.wq, self.wk))
        query, key, value = (each.unflatten(-1, (self.heads, -1)) for each in (*unit, self.wv(x)))
        result: Tensor = self.wo(attention(query, key, value, context))
        return result


class Block(nn.Module):
    """Attention and a gated feed-forward, shifted, scaled and gated by the class."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.ln1, self.ln2 = RootNorm(width, EPSILON), RootNorm(width, EPSILON)
        self.attn = Attention(width, heads)
        self.ff = GatedMLP(width, inner, names=("w1", "w3", "w2"), matrix=unbiased)

    def forward(self, x: Tensor, condition: Tensor, context: Context) -> Tensor:
        """(B, L, D); `condition` (B, 1, D)."""
        six = self.mlp(condition).chunk(6, dim=-1)
        x = x + six[2] * self.attn(modulated(self.ln1(x), *six[:2]), context)
        result: Tensor = x + six[5] * self.ff(modulated(self.ln2(x), *six[3:5]))
        return result


class HaltonTransformer(Backbone):
    """The denoiser of the transformer's arguments; CheckpointError for what is not supported.

    Its canvas is the grid of input_size x input_size positions, row by row; cond {"label": (B,)},
    of which `classes` is the null label.
    """

    tied: Mapping[str, str] = {"head.weight": "tok_emb.weight"}
    no_split = ("Block",)
    codes_per_position = 1
    head: nn.Module

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        fields.choice("proj", (1,), default=1)
        fields.choice("tome_keep_ratio", (1, 1.0), default=1)
        width, heads = fields.whole("hidden_dim"), fields.whole("heads")
        if heads > width:
            raise CheckpointError(f"config.json: heads={heads}: more than hidden_dim={width}")
        inner = max(1, -(-(2 * fields.whole("mlp_dim") // 3) // MULTIPLE)) * MULTIPLE
        side = fields.whole("input_size", most=MOST_SIDE)
        codes = fields.whole("codebook_size", most=MOST_IDS)
        depth = fields.whole("depth", most=MOST_LAYERS)
        classes = fields.whole("nclass", most=MOST_IDS)
        registers = fields.whole("register", least=0, most=MOST_REGISTERS)
        super().__init__(described, vocab_size=codes + 1, mask_id=codes, window=side**2)
        self.latent_grid, self.classes = (side, side), classes
        self.cls_emb = nn.Embedding(self.classes + 1, width)
        self.tok_emb = nn.Embedding(codes + 1, width)
        self.pos_emb = nn.Embedding(side**2, width)
        blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(depth))
        self.transformer = nn.ModuleDict({"layers": blocks})
        # Shifted and scaled by the class.
        self.last_norm = nn.ModuleDict({
            "norm_final": RootNorm(width, EPSILON, bias=True),
            "mlp": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        })  # fmt: skip
        self.head = nn.Linear(width, codes + 1)
        self.reg_tokens = nn.Embedding(registers, width) if registers else None

    def hidden(self, tokens: Tensor, call: Call) -> Tensor:
        """What `head` reads (B, L, D); ConfigError for what the model cannot be given."""
        label = class_of(call.cond, tokens, classes=self.classes)
        registers = 0 if self.reg_tokens is None else self.reg_tokens.num_embeddings
        positions, mask = grid_layout(
            tokens, call, window=self.pos_emb.num_embeddings, extra=registers
        )
        condition = self.cls_emb(label)[:, None]
        length = tokens.shape[1]
        x = self.tok_emb(tokens) + self.pos_emb(positions)
        if self.reg_tokens is not None:
            x = torch.cat([x, self.reg_tokens.weight.expand(len(x), -1, -1)], 1)
        for block in self.transformer["layers"].children():
            x = block(x, condition, Context(mask=mask))
        shift, scale = self.last_norm["mlp"](condition).chunk(2, dim=-1)
        return modulated(self.last_norm["norm_final"](x[:, :length]), shift, scale)


def recognises(described: Mapping[str, object]) -> bool:
    """Whether these are the transformer's arguments."""
    return {"register", "input_size", "nclass", "mlp_dim"} <= set(described)


halton_transformer = HaltonTransformer
