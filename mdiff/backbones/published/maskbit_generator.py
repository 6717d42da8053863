"""MaskBit's generator (Weber et al. 2024): `LFQBert`, a BERT over the bits of a position.

config.json holds the constructor's arguments: img_size, input_stride, hidden_dim,
codebook_size, codebook_splits, depth, heads, mlp_dim, nclass, use_prenorm. A position holds
`codebook_splits` tokens, side by side in the canvas, each of as many bits, read as -1 or +1,
the lowest first, and as zeros where hidden. The class follows the last position.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.attention import Context, attention
from mdiff.backbones.layers.backbone import Backbone, Call
from mdiff.backbones.layers.grid import class_of, grid_layout
from mdiff.backbones.layers.modules import drawn
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import MOST_IDS, MOST_LAYERS, MOST_WIDTH, Fields

ARCHITECTURES = ("LFQBert",)
EPSILON = 1e-12
MOST_BITS, MOST_SIDE = 48, 512


class Weights(nn.Module):
    """A matrix and a bias under the names of torch's multi-head attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = drawn(3 * width, width)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)


class Attention(nn.Module):
    """norm(x + attention(x)), or x + attention(norm(x)) with `before`."""

    def __init__(self, width: int, heads: int, *, before: bool) -> None:
        super().__init__()
        self.mha = Weights(width)
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.heads, self.before = heads, before

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, L, D)."""
        rows = self.norm(x) if self.before else x
        rows = F.linear(rows, self.mha.in_proj_weight, self.mha.in_proj_bias)
        query, key, value = rows.view(*rows.shape[:2], 3, self.heads, -1).unbind(2)
        x = x + self.mha.out_proj(attention(query, key, value, context))
        result: Tensor = x if self.before else self.norm(x)
        return result


class FeedForward(nn.Module):
    """norm(x + W gelu(V x)), or x + W gelu(V norm(x)) with `before`."""

    def __init__(self, width: int, inner: int, *, before: bool) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D)."""
        x = x + self.net(self.norm(x) if self.before else x)
        result: Tensor = x if self.before else self.norm(x)
        return result


class GroupHead(nn.Module):
    """One matrix for the heads of all groups, stored one below another.

    Rows (N, groups D + groups) hold a position's features in their group's columns among zeros,
    and a 1 in the group's own column, which picks its bias.
    """

    def __init__(self, width: int, groups: int, columns: int) -> None:
        super().__init__()
        self.codes_per_position = groups
        self.weight = drawn(groups * columns, width)
        self.bias = nn.Parameter(torch.zeros(groups * columns))

    def forward(self, x: Tensor) -> Tensor:
        """The logits (N, V)."""
        each = self.weight.view(self.codes_per_position, -1, self.weight.shape[1])
        bias = self.bias.view(self.codes_per_position, -1)
        return F.linear(x, torch.cat([each.transpose(0, 1).flatten(1), bias.mT], 1))


class MaskBitGenerator(Backbone):
    """The denoiser of LFQBert's arguments; CheckpointError for what is not supported.

    cond {"label": (B,)}, of which `classes` is the null label.
    """

    no_split = ("Attention", "FeedForward")

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        codes = fields.whole("codebook_size", least=2, most=1 << MOST_BITS)
        bits = codes.bit_length() - 1
        groups = fields.whole("codebook_splits", most=MOST_BITS, default=1)
        if codes != 1 << bits or bits % groups or 1 << bits // groups > MOST_IDS:
            raise CheckpointError(
                f"config.json: codebook_size={codes} in codebook_splits={groups}: expected a "
                "power of two whose bits the groups divide"
            )
        width, heads = fields.whole("hidden_dim"), fields.whole("heads")
        if width % heads:
            raise CheckpointError(f"config.json: heads={heads} do not divide hidden_dim={width}")
        stride = fields.whole("input_stride", default=16)
        size = fields.whole("img_size", least=stride, most=MOST_SIDE * stride, default=256)
        side, ids = size // stride, 1 << bits // groups
        super().__init__(described, vocab_size=ids, mask_id=ids, window=side**2 * groups)
        self.latent_grid, self.codes_per_position = (side, side), groups
        self.bits_per_token = bits // groups
        self._make(fields, width, heads)

    def _make(self, fields: Fields, width: int, heads: int) -> None:
        """The layers, in the order of the files."""
        depth = fields.whole("depth", most=MOST_LAYERS)
        inner = fields.whole("mlp_dim", most=8 * MOST_WIDTH)
        self.classes = fields.whole("nclass", most=MOST_IDS, default=1000)
        self.before = before = fields.flag("use_prenorm", default=False)
        groups, positions = self.codes_per_position, self.latent_grid[0] ** 2
        self.class_emb = nn.Embedding(self.classes + 1, width)
        self.input_proj = nn.Linear(groups * self.bits_per_token, width)
        self.pos_emb = drawn(1, positions + 1, width)
        self.first_layer = nn.Sequential(nn.LayerNorm(width, eps=EPSILON))
        pairs = (
            (Attention(width, heads, before=before), FeedForward(width, inner, before=before))
            for _ in range(depth)
        )
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(map(nn.ModuleList, pairs))})
        if before:
            self.norm_after_transformer = nn.LayerNorm(width, eps=EPSILON)
        self.last_layer = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=EPSILON)
        )
        self.prediction_layer = GroupHead(width, groups, self.vocab_size)
        # The value of each bit: stored in the files, and the same in all of them.
        values = 1 << torch.arange(self.bits_per_token, dtype=torch.int32)
        self.register_buffer("bits_to_indices", values)

    @property
    def head(self) -> nn.Module:
        """What makes logits of `hidden`."""
        return self.prediction_layer

    def hidden(self, tokens: Tensor, call: Call) -> Tensor:
        """What `head` reads (B, L, groups D + groups); ConfigError for a canvas that the model
        cannot be given. Padding is of whole positions.
        """
        label = class_of(call.cond, tokens, classes=self.classes)
        if tokens.shape[1] % self.codes_per_position:
            raise ConfigError(
                f"a canvas of {tokens.shape[1]} tokens: expected {self.codes_per_position} "
                "for each position"
            )
        groups = tokens.view(len(tokens), -1, self.codes_per_position)
        if call.valid is not None:
            call = call._replace(valid=call.valid.view(groups.shape).all(2))
        positions, mask = grid_layout(
            groups[..., 0], call, window=self.pos_emb.shape[1] - 1, extra=1
        )
        x = self.input_proj(self._signs(groups)) + self.pos_emb[0, positions]
        condition = self.class_emb(label)[:, None] + self.pos_emb[:, -1:]
        x = self.first_layer(torch.cat([x, condition], 1))
        for layer in self.transformer["layers"].children():
            attention, feed_forward = layer.children()
            x = feed_forward(attention(x, Context(mask=mask)))
        if self.before:
            x = self.norm_after_transformer(x)
        return self._grouped(self.last_layer(x[:, :-1]))

    def _signs(self, groups: Tensor) -> Tensor:
        """The bits (B, P, groups bits) of positions (B, P, groups): -1, +1, or 0 where hidden."""
        power = torch.arange(self.bits_per_token, device=groups.device)
        signs = 2 * (groups[..., None] >> power & 1) - 1
        hidden = groups == self.vocab_size
        known = signs.masked_fill(hidden[..., None], 0)
        return known.flatten(2).to(self.input_proj.weight.dtype)

    def _grouped(self, x: Tensor) -> Tensor:
        """Features of positions (B, P, D) as the head's rows of tokens (B, P groups, ...)."""
        own = torch.eye(self.codes_per_position, dtype=x.dtype, device=x.device)
        columns = torch.einsum("bpd,gh->bpghd", x, own).flatten(3)
        rows = torch.cat([columns, own.expand(*x.shape[:2], -1, -1)], 3)
        return rows.flatten(1, 2)


def recognises(described: Mapping[str, object]) -> bool:
    """Whether these are the generator's arguments."""
    return {"codebook_splits", "input_stride", "hidden_dim"} <= set(described)


maskbit_generator = MaskBitGenerator
