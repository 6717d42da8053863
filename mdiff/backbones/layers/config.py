"""The settings of our own transformer, checked, and how many weights they make."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Self, TypeVar

from mdiff.errors import ConfigError, nearest

TIME_FEATURES = 256
BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
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
    vocab_size: int
    mask_id: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    grid: list[int] | None
    layout: list[list[int]] | None
    max_length: int
    causal: bool
    qk_norm: bool
    tie: bool
    dropout: float
    uses_time: bool
    classes: int
    condition_width: int
    rope_base: float
    init_std: float

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Self:
        """The config of some of its fields by name; other names are not read.

        Raises ConfigError for a value that is invalid or contradicts another.
        """
        vocab_size = whole(options, "vocab_size", 256)
        width = whole(options, "width", 256)
        mask_id = whole(options, "mask_id", vocab_size, least=0, derived=True)
        if mask_id > vocab_size:
            raise ConfigError(f"mask_id={mask_id}: expected 0 to {vocab_size}")
        grid, layout = _grid_of(options.get("grid")), _layout_of(options.get("layout"))
        if grid is not None and layout is not None:
            raise ConfigError("grid and layout: give one of them")
        heads = whole(options, "heads", 4)
        axes = 1 if grid is None and layout is None else 2
        if width % (2 * axes * heads):
            raise ConfigError(
                f"width={width}, heads={heads}: expected a width divisible by "
                f"{2 * axes} * heads (rotary pairs on {axes} axis or axes)"
            )
        return cls(
            vocab_size=vocab_size, mask_id=mask_id, width=width, heads=heads, grid=grid,
            layout=layout, depth=whole(options, "depth", 6),
            mlp_width=whole(options, "mlp_width", math.ceil(width / 6) * 16, derived=True),
            max_length=whole(options, "max_length", 256),
            causal=flag(options, "causal", default=False),
            qk_norm=flag(options, "qk_norm", default=True),
            tie=flag(options, "tie", default=False),
            dropout=_number(options, "dropout", 0.0, least=0.0, below=1.0),
            uses_time=flag(options, "uses_time", default=False),
            classes=whole(options, "classes", 0, least=0),
            condition_width=whole(options, "condition_width", 128),
            rope_base=_number(options, "rope_base", 10000.0, least=1.0),
            init_std=_number(options, "init_std", 0.02, least=0.0),
        )  # fmt: skip

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


def whole(
    options: Mapping[str, object], name: str, default: int, *, least: int = 1,
    derived: bool = False,
) -> int:  # fmt: skip
    """A whole number of at least `least`; None stands for a default that is `derived`."""
    value = options.get(name, default)
    return _at_least(name, default if derived and value is None else value, least)


def flag(options: Mapping[str, object], name: str, *, default: bool) -> bool:
    """True or false."""
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: expected true or false")
    return value


def _number(
    options: Mapping[str, object], name: str, default: float, *, least: float,
    below: float = math.inf,
) -> float:  # fmt: skip
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r}: expected a number")
    if not least <= value < below:
        raise ConfigError(f"{name}={value}: expected at least {least} and below {below}")
    return value


def _at_least(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: expected a whole number of at least {least}")
    return value


def _grid_of(value: object) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"grid={value!r}: expected two whole numbers, h and w")
    return [_at_least("grid", side, 1) for side in value]


def _layout_of(value: object) -> list[list[int]] | None:
    if value is None:
        return None
    runs = value if isinstance(value, list | tuple) else []
    if not runs or not all(isinstance(run, list | tuple) and len(run) == 3 for run in runs):
        raise ConfigError(f"layout={value!r}: expected runs of (h, w, tokens per position)")
    return [[_at_least("layout", n, 1) for n in run] for run in runs]
