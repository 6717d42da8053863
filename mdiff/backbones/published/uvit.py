"""aMUSEd's denoiser, UVit2DModel of the diffusers layout (Patil et al. 2024).

ConvNeXt blocks and attention on the grid around a transformer, all conditioned on the output of a
text encoder. Project huggingface/diffusers, `models/unets/uvit_2d.py`, 0.42 (2026).
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mdiff.backbones.layers.backbone import Backbone, Call
from mdiff.backbones.layers.uvit import GridBlock, Parts, TransformerLayer, chain, waves
from mdiff.denoiser import MICRO, POOLED, STATES, Condition
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields

CLASS_NAME = "UVit2DModel"
MOST_SIDE = 4096


class UVit(Backbone):
    """The denoiser of a config.json of the diffusers layout, `_class_name` UVit2DModel.

    Its condition is that of `text_encoder`: the states of each token of a text, the one vector of
    it, and the numbers on size and crop of the picture. CheckpointError for an invalid config.

    The canvas is a square grid row by row, and its mask is the id after the last code; in the
    table of embeddings that is the last row, which the rows of ids without a code come before.
    Dropout, which the files name, is not applied.
    """

    no_split = ("TransformerLayer", "GridBlock")
    weights_name = "diffusion_pytorch_model"

    def __init__(self, described: Mapping[str, object]) -> None:
        fields = Fields(described)
        fields.choice("_class_name", (CLASS_NAME,))
        codes = fields.whole("codebook_size", most=MOST_IDS)
        rows = fields.whole("vocab_size", most=MOST_IDS)
        side = fields.whole("sample_size", most=MOST_SIDE)
        if rows <= codes:
            raise CheckpointError(
                f"config.json: vocab_size={rows}: expected more than the {codes} codes, for a mask"
            )
        super().__init__(described, vocab_size=codes, mask_id=codes, window=side * side)
        self.mask_row = rows - 1
        self.micro_size = fields.whole("micro_cond_encode_dim", least=2)
        self.states_size = fields.whole("encoder_hidden_size")
        self.pooled_size = fields.whole("cond_embed_dim")
        micro = fields.whole("micro_cond_embed_dim")
        self.micro_count = micro // self.micro_size
        if micro % self.micro_size or self.micro_size % 2:
            raise CheckpointError(
                f"config.json: micro_cond_embed_dim={micro}: expected a multiple of "
                f"micro_cond_encode_dim={self.micro_size}, which is even"
            )
        for name in ("hidden_dropout", "attention_dropout"):
            fields.number(name, most=1, default=0.0)
        self.halved = fields.flag("downsample", default=False)
        if fields.flag("upsample", default=False) != self.halved:
            raise CheckpointError("config.json: downsample and upsample: expected both or neither")
        self._make(fields, rows, inputs=micro + self.pooled_size)

    def _make(self, fields: Fields, rows: int, *, inputs: int) -> None:
        """The layers, in the order of the files; `inputs` numbers go into the condition."""
        width, grid = fields.whole("hidden_size"), fields.whole("block_out_channels")
        inner = fields.whole("in_channels")
        heads, grid_heads = fields.whole("num_attention_heads"), fields.whole("block_num_heads")
        for count, size in ((heads, width), (grid_heads, grid)):
            if size % count:
                raise CheckpointError(f"config.json: {count} heads do not divide {size} channels")
        parts = Parts(
            bias=fields.flag("use_bias", default=False),
            epsilon=fields.number("layer_norm_eps", most=1, default=1e-6),
            affine=fields.flag("ln_elementwise_affine", default=True),
        )
        self.encoder_proj = parts.matrix(self.states_size, width)
        self.encoder_proj_layer_norm = parts.norm(width)
        # Each token's vector, normalised and mapped to the width of the grid.
        self.embed = chain(
            embeddings=nn.Embedding(rows, inner), layer_norm=parts.norm(inner),
            conv=parts.pointwise(inner, grid),
        )  # fmt: skip
        self.cond_embed = chain(
            linear_1=parts.matrix(inputs, width), silu=nn.SiLU(),
            linear_2=parts.matrix(width, width),
        )  # fmt: skip
        block = partial(
            GridBlock, grid, parts, depth=fields.whole("num_res_blocks", most=MOST_LAYERS),
            heads=grid_heads, conditions=width,
        )  # fmt: skip
        self.down_block = block(halves=self.halved, doubles=False)
        self.project_to_hidden_norm = parts.norm(grid)
        self.project_to_hidden = parts.matrix(grid, width)
        gated = fields.whole("intermediate_size")
        self.transformer_layers = nn.ModuleList(
            TransformerLayer(width, heads, gated, parts)
            for _ in range(fields.whole("num_hidden_layers", most=MOST_LAYERS))
        )
        self.project_from_hidden_norm = parts.norm(width)
        self.project_from_hidden = parts.matrix(width, grid)
        self.up_block = block(halves=False, doubles=self.halved)
        self.mlm_layer = chain(
            conv1=parts.pointwise(grid, inner), layer_norm=parts.norm(inner),
            conv2=parts.pointwise(inner, self.vocab_size),
        )  # fmt: skip

    @property
    def head(self) -> nn.Module:
        """From a position's vector to its logits; every part is a map of the position alone."""
        return self.mlm_layer

    def hidden(self, tokens: Tensor, call: Call) -> Tensor:
        """What `head` reads (B, L, C).

        Raises ConfigError for padding, packed documents, a cache or a condition that is missing
        or of another shape, DataError for a canvas that is no square.
        """
        if any(each is not None for each in (call.valid, call.documents, call.cache)):
            raise ConfigError("this model fills whole grids: no padding, documents or cache")
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1] or (self.halved and side % 2):
            kind = "a square of an even side" if self.halved else "a square"
            raise DataError(f"a canvas of {tokens.shape[1]} positions: expected {kind}")
        states, condition = self._conditions(call.cond, len(tokens))
        rows = torch.where(tokens == self.vocab_size, self.mask_row, tokens)
        x = self.down_block(self.embed(rows).unflatten(1, (side, side)), states, condition)
        shape = x.shape[1:3]
        x = self.project_to_hidden(self.project_to_hidden_norm(x.flatten(1, 2)))
        for layer in self.transformer_layers:
            x = layer(x, states, condition)
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        done: Tensor = self.up_block(x.unflatten(1, shape), states, condition)
        return done.flatten(1, 2)

    def _conditions(self, cond: Condition | None, batch: int) -> tuple[Tensor, Tensor]:
        """The sequence (B, S, D) that is attended to, and the vector (B, D) that scales."""
        given = cond or {}
        sizes: dict[str, tuple[int | str, ...]] = {
            STATES: (batch, "S", self.states_size), POOLED: (batch, self.pooled_size),
            MICRO: (batch, self.micro_count),
        }  # fmt: skip
        for name, wanted in sizes.items():
            got = tuple(given[name].shape) if name in given else ()
            if len(got) != len(wanted) or any(n not in ("S", m) for n, m in zip(wanted, got)):
                raise ConfigError(
                    f"condition {name!r} {got if name in given else None}: expected "
                    f"({', '.join(map(str, wanted))})"
                )
        kind = self.encoder_proj.weight.dtype
        states = self.encoder_proj_layer_norm(self.encoder_proj(given[STATES].to(kind)))
        micro = waves(given[MICRO], self.micro_size).flatten(1)
        return states, self.cond_embed(torch.cat([given[POOLED].float(), micro], 1).to(kind))


def recognises(described: Mapping[str, object]) -> bool:
    """Whether a config without architectures is of this model."""
    return described.get("_class_name") == CLASS_NAME


uvit = UVit
