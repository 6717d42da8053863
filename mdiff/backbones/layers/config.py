"""The settings of our own transformer, checked, and how many weights they make."""

import math
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, ClassVar, Self, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from mdiff.errors import ConfigError, nearest
from mdiff.files import STRICT, parse_settings

TIME_FEATURES = 256
BYTES_PER_WEIGHT = 4
# What follows from other options where it is null or not given.
DERIVED = ("mask_id", "mlp_width")
# More are no size of a tensor.
MOST = 2**62
Count = Annotated[int, Field(strict=True, ge=1, le=MOST)]
# Tuples too.
Sides = Annotated[list[Count], Field(strict=False, min_length=2, max_length=2)]
Run = Annotated[list[Count], Field(strict=False, min_length=3, max_length=3)]


@dataclass(config=STRICT, frozen=True)
class TransformerConfig:
    """The shape of a `Transformer`; `TransformerConfig.of(options)` has the defaults.

    `vocab_size` logit columns; `mask_id` may lie inside or be `vocab_size` (the default).
    `mlp_width` is the hidden width of SwiGLU, by default 8/3 of the width, rounded up to a
    multiple of 16. `grid` [h, w] makes positions two-dimensional. `layout`, runs of
    [h, w, tokens per position], does so for a canvas of several parts, and gives each position
    an embedding of its own: rotary positions alone cannot tell positions apart on a canvas on
    which everything is hidden. `classes` labels, and one more, the null label, number `classes`.
    `max_length` is the window that the model is trained on; nothing here is limited by it.
    `causal` turns it into a left-to-right model, for baselines.
    """

    # What a modality and its data decide: of a recipe no option.
    not_offered: ClassVar[frozenset[str]] = frozenset(
        {"vocab_size", "mask_id", "max_length", "layout", "classes"}
    )
    vocab_size: Count = 256
    mask_id: Annotated[int, Field(ge=0)] = -1
    width: Count = 256
    depth: Count = 6
    heads: Count = 4
    mlp_width: Count = 0
    grid: Annotated[Sides | None, Field(description="two whole numbers of at least 1, h and w")] = (
        None
    )
    layout: Annotated[
        Annotated[list[Run], Field(strict=False, min_length=1)] | None,
        Field(description="runs of (h, w, tokens per position), each at least 1"),
    ] = None
    max_length: Count = 256
    causal: bool = False
    qk_norm: bool = True
    tie: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    uses_time: bool = False
    classes: Annotated[int, Field(ge=0, le=MOST)] = 0
    condition_width: Count = 128
    rope_base: Annotated[float, Field(ge=1)] = 10000.0
    init_std: Annotated[float, Field(ge=0)] = 0.02

    def __post_init__(self) -> None:
        if self.mask_id < 0:
            object.__setattr__(self, "mask_id", self.vocab_size)
        if self.mlp_width < 1:
            object.__setattr__(self, "mlp_width", math.ceil(self.width / 6) * 16)

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """The config of some of its fields by name; other names are not read.

        Raises ConfigError for a value that is invalid or contradicts another.
        """
        given = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        absent = [name for name in DERIVED if given.get(name) is None]
        config = parse_settings(cls, {n: v for n, v in given.items() if n not in absent})
        width, heads, vocab_size = config.width, config.heads, config.vocab_size
        if config.mask_id > vocab_size:
            raise ConfigError(f"mask_id={config.mask_id}: expected 0 to {vocab_size}")
        if config.grid is not None and config.layout is not None:
            raise ConfigError("grid and layout: give one of them")
        axes = 1 if config.grid is None and config.layout is None else 2
        if width % (2 * axes * heads):
            raise ConfigError(
                f"width={width}, heads={heads}: expected a width divisible by "
                f"{2 * axes} * heads (rotary pairs on {axes} axis or axes)"
            )
        return config

    @property
    def rows(self) -> int:
        """How many ids have an embedding: the vocabulary, and the mask where it is outside."""
        return max(self.vocab_size, self.mask_id + 1)

    @property
    def positions(self) -> int:
        """How many positions have an embedding of their own: those of `layout`, or 0."""
        return sum(h * w * each for h, w, each in self.layout or ())

    @property
    def conditional(self) -> bool:
        """Whether the model takes the time or a class."""
        return self.uses_time or self.classes > 0

    @property
    def parameter_count(self) -> int:
        """How many weights a model of this shape has, known before any is allocated.

        >>> TransformerConfig.of(dict(vocab_size=10, width=8, depth=1, heads=2)).parameter_count
        1224
        """
        width, inner = self.width, self.condition_width * self.conditional
        block = 4 * width * width + 3 * width * self.mlp_width + 2 * width + 6 * width * inner
        block += 2 * (width // self.heads) * self.qk_norm
        ends = (self.rows + self.positions) * width + width + 2 * width * inner
        ends += 0 if self.tie else self.vocab_size * width
        condition = (TIME_FEATURES + inner) * inner * self.uses_time
        condition += (self.classes + 1) * inner * (self.classes > 0)
        return int(self.depth * block + ends + condition)


Config = TypeVar("Config", bound=TransformerConfig)


def checked(kind: type[Config], options: Mapping[str, object], label: str) -> Config:
    """The config of a new model; ConfigError for an option that `kind` lacks, naming the nearest
    one, or where this machine cannot hold so many weights.
    """
    known = {field.name for field in fields(kind)}
    for name in options:
        if name not in known:
            offered = nearest(name, known - kind.not_offered)
            raise ConfigError(f"unknown option {name!r} of {label}; {offered}")
    config = kind.of(options)
    need = config.parameter_count * BYTES_PER_WEIGHT
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > memory:
        raise ConfigError(
            f"a transformer of {config.parameter_count:,} weights needs {need / 2**30:,.0f} GiB; "
            f"this machine has {memory / 2**30:,.0f} GiB: reduce width or depth"
        )
    return config
