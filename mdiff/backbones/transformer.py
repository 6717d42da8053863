"""Our backbone: a bidirectional transformer.

RMSNorm, rotary positions in one or two dimensions, SwiGLU, no biases; where the model takes the
time or a class, adaLN that starts as the identity (Peebles & Xie 2023, section 3.2).
"""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.attention import (
    attention_layout,
    layout_axes,
    rotary_tables,
    with_shadows,
)
from mdiff.backbones.layers.backbone import Backbone
from mdiff.backbones.layers.config import TIME_FEATURES, TransformerConfig, checked
from mdiff.backbones.layers.modules import RMSNorm, modulated
from mdiff.backbones.layers.transformer import Block, Projection, of_rows, time_features
from mdiff.denoiser import Cache, Condition, Rows, flat_positions
from mdiff.errors import ConfigError
from mdiff.kernels.dense import linear
from mdiff.kernels.loss_heads import LinearMap

# The name of the position embedding's module, as files that exist have it.
POSITION_EMBEDDING = "place"  # alias: place.weight


class Head(Projection):
    """Logits (N, V) of features (N, D); a tied matrix has one row more where V is the mask."""

    def __init__(self, width: int, columns: int, rows: int, init_std: float) -> None:
        super().__init__(width, rows, init_std)
        self.columns = columns

    def forward(self, x: Tensor) -> Tensor:
        """The `columns` logits of each row of `x`."""
        return linear(x, self.weight[: self.columns])

    def linear_map(self) -> LinearMap:
        """What `forward` multiplies by, for the loss that does so in chunks."""
        return LinearMap(self.weight, None, self.columns)


class Transformer(Backbone):
    """The model of a config, with initial weights by torch's global generator.

    `mdiff.backbones.layers.hugging_face` has it as a model of transformers.
    """

    model_type: ClassVar[str] = "mdiff-transformer"
    # What config.json calls the class, which is that of `mdiff.backbones.layers.hugging_face`.
    architecture: ClassVar[str] = "TransformerForMaskedLM"
    no_split = ("Block",)
    head: nn.Module

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            asdict(config), vocab_size=config.vocab_size, mask_id=config.mask_id,
            window=config.max_length,
        )  # fmt: skip
        self.config = config
        self.uses_time = config.uses_time
        width, inner, std = config.width, config.condition_width, config.init_std
        table = nn.Embedding(config.rows, width)
        self.embedding: nn.Module = table
        self.positions = count = config.positions
        self.register_module(POSITION_EMBEDDING, nn.Embedding(count, width) if count else None)
        self.time_in = Projection(TIME_FEATURES, inner, std) if config.uses_time else None
        self.time_out = Projection(inner, inner, std) if config.uses_time else None
        self.label = nn.Embedding(config.classes + 1, inner) if config.classes else None
        self.modulation = Projection(inner, 2 * width, 0.0) if config.conditional else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(width)
        columns = config.vocab_size
        self.head = head = Head(width, columns, config.rows if config.tie else columns, std)
        self.apply(self.initialise)
        if config.tie:
            self.tied = {"head.weight": "embedding.weight"}
            head.weight = table.weight

    @torch.no_grad()
    def initialise(self, module: nn.Module) -> None:
        """Normal weights, smaller on the way back to the stream; adaLN starts at zero."""
        if isinstance(module, Projection):
            nn.init.normal_(module.weight, std=module.init_std)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    @property
    def position_embedding(self) -> nn.Module | None:
        """The embedding of each position of the layout; None without a layout."""
        return self._modules[POSITION_EMBEDDING]

    def saved_config(self) -> dict[str, object]:
        """What config.json holds, as transformers writes it."""
        return dict(
            sorted({
                **self.described, "architectures": [self.architecture],
                "dtype": str(self.dtype).removeprefix("torch."), "model_type": self.model_type,
                "transformers_version": version("transformers"),
            }.items())
        )  # fmt: skip

    def features(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: Cache | None = None, number: int | None = None, layer: int | None = None,
        shadow_id: int | None = None,
    ) -> Tensor:  # fmt: skip
        """What `head` reads: (B, L, D), or the rows `at` (B, L) bool in row-major order, (N, D).

        With `at`, everything after the last attention runs on those rows alone. With `layer`,
        1 to depth, the stream as it leaves that block, and no block after it is run. With the
        mask's `shadow_id`, the rows of tokens are those of their shadows. Raises ConfigError for
        a cache, a missing `t` or conditions that are not this model's.
        """
        if cache is not None:
            raise ConfigError("this transformer keeps no cache: call it with cache=None")
        last = len(self.blocks) if layer is None else layer
        if not 1 <= last <= len(self.blocks):
            raise ConfigError(f"layer={layer}: this model has layers 1 to {len(self.blocks)}")
        condition = self._condition(t, cond, tokens)
        positions, mask = attention_layout(
            tokens, valid=valid, documents=documents, causal=self.config.causal
        )
        length, rows = tokens.shape[1], None if at is None else flat_positions(at, number)
        if shadow_id is not None and at is not None:
            if mask is None and self.config.causal:
                mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=at.device).tril()
            tokens, positions, mask, rows = with_shadows(
                tokens, positions, mask, at=at, mask_id=shadow_id, number=number
            )
        tables = rotary_tables(
            positions, self.config.width // self.config.heads, grid=self.config.grid,
            axes=layout_axes(self.config.layout) if self.config.layout else None,
            base=self.config.rope_base,
        )  # fmt: skip
        x: Tensor = self.embedding(tokens)
        if self.position_embedding is not None:
            if length > self.positions:
                raise ConfigError(
                    f"a canvas of {length} positions: this model's layout has {self.positions}"
                )
            x = x + self.position_embedding(positions)
        for block in self.blocks[: last - 1]:
            x = block(x, tables, mask, condition)
        x = self.blocks[last - 1](x, tables, mask, condition, rows)
        if layer is not None:
            return x
        x = self.norm(x)
        if self.modulation is None or condition is None:
            return x
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        if rows is not None:
            shift, scale = (of_rows(each, rows, tokens.shape[1]) for each in (shift, scale))
        return modulated(x, shift, scale)

    def has_shadows(self) -> bool:
        """Whether each token has a position of its own."""
        return True

    def shadow_rows(
        self, tokens: Tensor, *, at: Tensor, mask_id: int, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The rows at the positions `at` (B, L) bool, those of tokens by their shadows."""
        x = self.features(
            tokens, at=at, valid=valid, t=t, cond=cond, number=number, shadow_id=mask_id
        )
        return Rows(x, head=self.head)

    def _condition(self, t: Tensor | None, cond: Condition | None, tokens: Tensor) -> Tensor | None:
        """The summed embedding (B, C) of the time and the label; None where it has neither."""
        unknown = set(cond or ()) - ({"label"} if self.label is not None else set())
        if unknown:
            takes = "'label' alone" if self.label is not None else "no condition"
            raise ConfigError(f"condition {sorted(unknown)[0]!r}: this model takes {takes}")
        condition: Tensor | None = None
        if self.label is not None:
            label = (cond or {}).get("label")
            if label is None:
                label = tokens.new_full(tokens.shape[:1], self.config.classes)
            condition = self.label(label)
        if self.time_in is not None and self.time_out is not None:
            if t is None:
                raise ConfigError("this model uses the time: call it with t=")
            waves = time_features(t, TIME_FEATURES).to(self.time_in.weight.dtype)
            time = self.time_out(F.silu(self.time_in(waves)))
            condition = time if condition is None else condition + time
        return None if condition is None else F.silu(condition)


def transformer(described: Mapping[str, object] | None = None, /, **options: object) -> Transformer:
    """A freshly initialised model; the options are those of `TransformerConfig`.

    The weights come from torch's global generator: seed it to get the same ones. Given a
    `described` config.json instead, the model of that. Raises ConfigError for unknown or absurd
    options, and where the machine's memory is too small.

    >>> model = transformer(vocab_size=5, width=16, depth=1, heads=2)
    >>> model(torch.zeros(2, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 5])
    """
    if described is not None:
        return Transformer(TransformerConfig.of(described))
    return Transformer(checked(TransformerConfig, options, "the transformer"))
