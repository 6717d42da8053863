"""Our backbone: a bidirectional transformer, both a Denoiser and a transformers model.

RMSNorm, rotary positions in one or two dimensions, SwiGLU, no biases; where it is told the
time or a class, adaLN that starts as the identity (Peebles & Xie 2023, section 3.2).
"""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from mdiff.backbones.layers.transformer import (
    Block,
    Projection,
    RMSNorm,
    attention_layout,
    layout_axes,
    modulated,
    of_rows,
    rotary_tables,
    time_features,
)
from mdiff.denoiser import Condition, flat_positions
from mdiff.errors import ConfigError, nearest
from mdiff.kernels.dense import linear
from mdiff.kernels.loss_heads import LinearMap

TIME_FEATURES = 256
BYTES_PER_WEIGHT = 4


class TransformerConfig(PretrainedConfig):  # type: ignore[misc]
    """The shape of a `TransformerForMaskedLM`; every option has its default here.

    `vocab_size` logit columns; `mask_id` may lie inside or be `vocab_size` (None means that).
    `mlp_width` is the hidden width of SwiGLU, by default 8/3 of the width, rounded up to a
    multiple of 16. `grid` (h, w) makes positions two-dimensional. `layout`, runs of
    (h, w, tokens a place), does so for a canvas of several parts, and gives each place an
    embedding of its own: rotary positions alone cannot tell places apart on a canvas on which
    everything is hidden. `classes` labels, and one more, the null label, number `classes`.
    `max_length` is the window that the model is trained on; nothing here is limited by it.
    `causal` turns it into a left-to-right model,
    for baselines.

    Raises ConfigError for what cannot be meant.
    """

    model_type = "mdiff-transformer"
    # Without this only what differs from the defaults of the day would be written down.
    has_no_defaults_at_init: ClassVar[bool] = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "max_length",
        "tie_word_embeddings": "tie",
    }

    vocab_size: int = 256
    mask_id: int = None  # type: ignore[assignment]
    width: int = 256
    depth: int = 6
    heads: int = 4
    mlp_width: int = None  # type: ignore[assignment]
    grid: tuple[int, int] | list[int] | None = None
    layout: list[list[int]] | list[tuple[int, int, int]] | None = None
    max_length: int = 256
    causal: bool = False
    qk_norm: bool = True
    tie: bool = False
    dropout: float = 0.0
    uses_time: bool = False
    classes: int = 0
    condition_width: int = 128
    rope_base: float = 10000.0
    init_std: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "width", "depth", "heads", "max_length", "condition_width"):
            _whole(name, getattr(self, name), least=1)
        _whole("classes", self.classes, least=0)
        # None is how a caller leaves these two to be derived; afterwards they are numbers.
        derived = {"mask_id": self.vocab_size, "mlp_width": math.ceil(self.width / 6) * 16}
        for name, value in derived.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        _whole("mlp_width", self.mlp_width, least=1)
        if _whole("mask_id", self.mask_id, least=0) > self.vocab_size:
            raise ConfigError(f"mask_id={self.mask_id}: expected 0 to {self.vocab_size}")
        for name in ("causal", "qk_norm", "tie", "uses_time"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected true or false")
        for name, least, below in (
            ("dropout", 0.0, 1.0), ("rope_base", 1.0, math.inf), ("init_std", 0.0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{name}={value!r}: expected a number")
            if not least <= value < below:
                raise ConfigError(f"{name}={value}: expected at least {least} and below {below}")
        self._check_heads_and_grid()
        super().__post_init__(**kwargs)

    def _check_heads_and_grid(self) -> None:
        axes = 1
        if self.grid is not None:
            if not isinstance(self.grid, list | tuple) or len(self.grid) != 2:
                raise ConfigError(f"grid={self.grid!r}: expected two whole numbers, h and w")
            self.grid = [_whole("grid", side, least=1) for side in self.grid]
            axes = 2
        if self.layout is not None:
            if self.grid is not None:
                raise ConfigError("grid and layout: give one of them")
            runs = self.layout if isinstance(self.layout, list | tuple) else []
            if not runs or not all(isinstance(r, list | tuple) and len(r) == 3 for r in runs):
                raise ConfigError(
                    f"layout={self.layout!r}: expected runs of (h, w, tokens a place)"
                )
            self.layout = [[_whole("layout", n, least=1) for n in run] for run in runs]
            axes = 2
        if self.width % (2 * axes * self.heads):
            raise ConfigError(
                f"width={self.width}, heads={self.heads}: expected a width divisible by "
                f"{2 * axes} * heads (rotary pairs on {axes} axis or axes)"
            )

    @property
    def rows(self) -> int:
        """How many ids have an embedding: the vocabulary, and the mask where it is outside."""
        return max(self.vocab_size, self.mask_id + 1)

    @property
    def places(self) -> int:
        """How many places have an embedding of their own: those of `layout`, or 0."""
        return sum(h * w * each for h, w, each in self.layout or ())

    @property
    def conditional(self) -> bool:
        """Whether the model is told the time or a class."""
        return self.uses_time or self.classes > 0


def parameter_count(config: TransformerConfig) -> int:
    """How many weights a model of this shape has, known before any is allocated.

    >>> parameter_count(TransformerConfig(vocab_size=10, width=8, depth=1, heads=2))
    1224
    """
    width, inner = config.width, config.condition_width * config.conditional
    block = 4 * width * width + 3 * width * config.mlp_width + 2 * width + 6 * width * inner
    block += 2 * (width // config.heads) * config.qk_norm
    ends = (config.rows + config.places) * width + width + 2 * width * inner
    ends += 0 if config.tie else config.vocab_size * width
    told = (TIME_FEATURES + inner) * inner * config.uses_time
    told += (config.classes + 1) * inner * (config.classes > 0)
    return int(config.depth * block + ends + told)


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


class TransformerForMaskedLM(PreTrainedModel):  # type: ignore[misc]
    """The model. Called with `tokens` it is a Denoiser; with `input_ids=`, as transformers does.

    The first argument by place is `tokens`, so `model(tokens, at=...)` returns the logits as
    `mdiff.denoiser.Denoiser` says, also through DistributedDataParallel or peft, which wrap
    `forward`; `model(input_ids=..., labels=...)` returns a MaskedLMOutput.
    """

    config_class = TransformerConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.weight"}

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        inner, std = config.condition_width, config.init_std
        self.embedding = nn.Embedding(config.rows, config.width)
        self.place = nn.Embedding(config.places, config.width) if config.places else None
        self.time_in = self.time_out = self.label = self.modulation = None
        if config.uses_time:
            self.time_in = Projection(TIME_FEATURES, inner, std)
            self.time_out = Projection(inner, inner, std)
        if config.classes:
            self.label = nn.Embedding(config.classes + 1, inner)
        if config.conditional:
            self.modulation = Projection(inner, 2 * config.width, 0.0)
        self.blocks = nn.ModuleList(
            Block(
                config.width, config.heads, mlp_width=config.mlp_width, depth=config.depth,
                condition_width=inner * config.conditional, qk_norm=config.qk_norm,
                causal=config.causal, dropout=config.dropout, init_std=std,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = RMSNorm(config.width)
        columns = config.vocab_size
        self.head = Head(config.width, columns, config.rows if config.tie else columns, std)
        self.post_init()

    @property
    def uses_time(self) -> bool:
        """Whether a call needs `t`."""
        return bool(self.config.uses_time)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights, smaller on the way back to the stream; adaLN starts at zero."""
        if isinstance(module, Projection):
            init.normal_(module.weight, std=module.init_std)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Any = None,
        number: int | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits of `tokens` (see the Denoiser protocol), or MaskedLMOutput of `input_ids`.

        `attention_mask` (B, L) is nonzero at valid places; `labels` (B, L) hold -100 where
        nothing is scored, and the loss is the mean cross-entropy of the others in nats.
        Raises ConfigError for a cache, a missing `t` or conditions that are not this model's.
        """
        if cache is not None:
            raise ConfigError("this transformer keeps no cache: call it with cache=None")
        if tokens is not None:
            x = self.features(
                tokens, at=at, valid=valid, documents=documents, t=t, cond=cond, number=number
            )
            return self.head(x)
        if input_ids is None:
            raise ConfigError("a call without tokens: give them first, or as input_ids=")
        if attention_mask is not None:
            valid = attention_mask.bool()
        x = self.features(input_ids, at=at, valid=valid, documents=documents, t=t, cond=cond)
        logits, loss = self.head(x), None
        if labels is not None:
            labels = labels if at is None else labels[at]
            loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    def features(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        number: int | None = None,
        layer: int | None = None,
    ) -> Tensor:
        """What `head` reads: (B, L, D), or the rows `at` (B, L) bool in row-major order, (N, D).

        With `at`, everything after the last attention runs on those rows alone. With `layer`,
        1 to depth, the stream as it leaves that block, and no block after it is run.
        """
        last = self.config.depth if layer is None else layer
        if not 1 <= last <= self.config.depth:
            raise ConfigError(f"layer={layer}: this model has layers 1 to {self.config.depth}")
        told = self._told(t, cond, tokens)
        positions, sees = attention_layout(
            tokens, valid=valid, documents=documents, causal=self.config.causal
        )
        if self.place is not None and tokens.shape[1] > self.config.places:
            raise ConfigError(
                f"a canvas of {tokens.shape[1]} places: this model's layout has "
                f"{self.config.places}"
            )
        tables = rotary_tables(
            positions, self.config.width // self.config.heads, grid=self.config.grid,
            axes=layout_axes(self.config.layout) if self.config.layout else None,
            base=self.config.rope_base,
        )  # fmt: skip
        rows = None if at is None else flat_positions(at, number)
        x: Tensor = self.embedding(tokens)
        if self.place is not None:
            x = x + self.place(positions)
        for block in self.blocks[: last - 1]:
            x = block(x, tables, sees, told)
        x = self.blocks[last - 1](x, tables, sees, told, rows)
        if layer is not None:
            return x
        x = self.norm(x)
        if self.modulation is None or told is None:
            return x
        shift, scale = self.modulation(told)[:, None].chunk(2, -1)
        if rows is not None:
            shift, scale = (of_rows(each, rows, tokens.shape[1]) for each in (shift, scale))
        return modulated(x, shift, scale)

    def _told(self, t: Tensor | None, cond: Condition | None, tokens: Tensor) -> Tensor | None:
        """The summed embedding (B, C) of the time and the label; None where it has neither."""
        unknown = set(cond or ()) - ({"label"} if self.label is not None else set())
        if unknown:
            takes = "'label' alone" if self.label is not None else "no condition"
            raise ConfigError(f"condition {sorted(unknown)[0]!r}: this model takes {takes}")
        told: Tensor | None = None
        if self.label is not None:
            label = (cond or {}).get("label")
            if label is None:
                label = tokens.new_full(tokens.shape[:1], self.config.classes)
            told = self.label(label)
        if self.time_in is not None and self.time_out is not None:
            if t is None:
                raise ConfigError("this model uses the time: call it with t=")
            waves = time_features(t, TIME_FEATURES).to(self.time_in.weight.dtype)
            time = self.time_out(F.silu(self.time_in(waves)))
            told = time if told is None else told + time
        return None if told is None else F.silu(told)


def transformer(**options: Any) -> TransformerForMaskedLM:
    """A freshly initialised model; the options are those of `TransformerConfig`.

    The weights come from torch's global generator: seed it to get the same ones. Raises
    ConfigError for unknown or absurd options, and where the machine's memory is too small.

    >>> model = transformer(vocab_size=5, width=16, depth=1, heads=2)
    >>> model(torch.zeros(2, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 5])
    """
    check_options(options, TransformerConfig, "the transformer")
    config = TransformerConfig(**options)
    check_memory(parameter_count(config))
    return TransformerForMaskedLM(config)


def check_options(options: dict[str, Any], kind: type, label: str) -> None:
    """Raise ConfigError, with the nearest name, for an option that the config `kind` lacks."""
    ours = [base for base in kind.__mro__ if issubclass(base, TransformerConfig)]
    known = {name for base in ours for name in vars(base).get("__annotations__", {})}
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r} of {label}; {nearest(name, known)}")


def check_memory(weights: int) -> None:
    """Raise ConfigError where this machine cannot hold so many weights, before any is made."""
    need = weights * BYTES_PER_WEIGHT
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise ConfigError(
            f"a transformer of {weights:,} weights needs {need / 2**30:,.0f} GiB; "
            f"this machine has {memory / 2**30:,.0f} GiB: reduce width or depth"
        )


def _whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: expected a whole number of at least {least}")
    return value


AutoConfig.register(TransformerConfig.model_type, TransformerConfig, exist_ok=True)
AutoModelForMaskedLM.register(TransformerConfig, TransformerForMaskedLM, exist_ok=True)
