"""Recipes: the settings of a training run, a YAML file that is checked before anything is built."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue

from mdiff.errors import ConfigError
from mdiff.files import STRICT, parse_settings, parse_yaml

MAX_RECIPE_BYTES = 2**16

Positive = Annotated[float, Field(gt=0)]
# Far above any that trains, and far below where float32 ends.
Rate = Annotated[float, Field(gt=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Settings with known names only; a value is not coerced into another type."""

    model_config = {**STRICT, "frozen": True}


class OpenSection(BaseModel):
    """Settings with some known names; the other keys are `options`, checked by who takes them."""

    model_config = {**STRICT, "frozen": True, "extra": "allow"}
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keys without a known name."""
        return dict(self.__pydantic_extra__)


class Part(OpenSection):
    """A part found by `name`, with its own options."""

    name: str


class Schedule(Part):
    """The noise schedule, by name, with its own numbers."""

    name: str = "linear"


class Data(OpenSection):
    """The source of the rows; all keys but `length`, tokens a row, are the modality's own.

    A null `length` leaves it to the modality, where the medium fixes it.
    """

    length: Count | None = None


class Ratio(Section):
    """The share of hidden tokens drawn from a normal cut to [low, high], not from the schedule.

    The defaults are those of MAGE (Li et al. 2023, section 3.1).
    """

    mean: float = 0.55
    std: Positive = 0.25
    low: Annotated[float, Field(ge=0, lt=1)] = 0.5
    high: Annotated[float, Field(gt=0, le=1)] = 1.0


class Objective(Section):
    """The loss. `process` is noise that also writes random tokens, such as {name: mixed}, on the
    schedule; null hides tokens only. `max_weight` clips w(t), of a process the weight of each
    position; null leaves the bound as it is. The weights "dynamic" and "cross_entropy" are of a
    process, see `diffusion_loss`; with the latter the model predicts the posterior.

    `cond_drop` is the probability with which a row's condition is left out. `given` are the
    parts of a canvas that are given, with weights: {"": 2, "a": 1, "a+b": 1}. `ratio` draws the
    share of hidden tokens from a truncated normal; the weight is then "uniform".
    """

    schedule: Schedule = Schedule()
    process: Part | None = None
    weight: Literal["bound", "uniform", "dynamic", "cross_entropy"] = "bound"
    max_weight: Positive | None = None
    label_smoothing: Fraction = 0.0
    cond_drop: Fraction = 0.0
    given: dict[str, Positive] | None = None
    ratio: Ratio | None = None


class Optim(Section):
    """The optimiser: `adamw`, or `muon` for the hidden matrices with AdamW for the rest.

    `lr` is the rate of the whole (adamw) or of the matrices (muon), `adam_lr` of the rest
    under muon (null: `lr`). `muon_scale`: "rms" gives an update the size of AdamW's, so that
    one rate serves both; "spectral" is the original. The rate rises over `warmup_steps`, then
    falls towards `final_lr` times itself at the end along `schedule`, or stays.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-3
    adam_lr: Rate | None = None
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    momentum: Fraction = 0.95
    muon_scale: Literal["rms", "spectral"] = "rms"
    grad_clip: Positive | None = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.0


class Train(Section):
    """The run. `batch_size` is global rows a step, over all processes and micro-batches.

    `micro_batch`: rows in a process's forward pass (null: its whole share). `keep`: the number of
    checkpoints that are kept (null: all). `ema`: decay of the averaged weights (null: none).
    `workers`: processes that prepare rows. `nonfinite`: stop at a step with NaN, or skip it.
    `validate_every` so many steps (null: never) and after the last one, the bound of
    `validate_rows` rows of the validation split is measured with `validate_draws` maskings each.
    """

    steps: Count
    batch_size: Count
    micro_batch: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    save_every: Count = 1000
    keep: Count | None = 3
    ema: Fraction | None = None
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    compile: bool = False
    workers: Annotated[int, Field(ge=0, le=256)] = 0
    nonfinite: Literal["stop", "skip"] = "stop"
    validate_every: Count | None = None
    validate_rows: Count = 64
    validate_draws: Annotated[int, Field(ge=2)] = 8


class Log(Section):
    """Progress: a console line `every` so many steps, which the `trackers` get too.

    These are "tensorboard", "trackio" or `pkg.mod:name`, a GeneralTracker of accelerate.
    `tensorboard: true` is the first of them.
    """

    every: Count = 10
    trackers: list[str] = []
    tensorboard: bool = False


class Recipe(Section):
    """Everything that defines a training run."""

    data: Data
    modality: Part
    model: Part
    objective: Objective = Objective()
    optim: Optim = Optim()
    train: Train
    log: Log = Log()


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `overrides` such as "train.steps=40" applied.

    Raises ConfigError, one line with the dotted key and the nearest known one.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror}") from None
    if len(text) > MAX_RECIPE_BYTES:
        raise ConfigError(f"recipe {path}: more than {MAX_RECIPE_BYTES} bytes")
    content = parse_yaml(text, origin=f"recipe {path}")
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path}: expected sections {', '.join(Recipe.model_fields)}")
    for override in overrides:
        content = _overridden(content, override)
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """The recipe of nested plain values; ConfigError as in `load_recipe`."""
    return parse_settings(Recipe, content)


def differences(
    old: Recipe, new: Recipe, *, ignore: Iterable[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, with both; `ignore` names keys or sections."""
    before, after = values(old), values(new)
    ignored = tuple(f"{name}." for name in ignore)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and not f"{key}.".startswith(ignored)
    }


def values(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys of a recipe with their values, of types that JSON has."""
    return dict(_leaves("", recipe.model_dump(mode="json")))


def _leaves(prefix: str, section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def _overridden(content: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of `content` with "a.b=value" set, the value read as YAML."""
    origin, (key, equals, text) = f"override {override[:80]!r}", override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all((*sections, last)):
        raise ConfigError(f"{origin}: expected section.key=value")
    changed = inner = dict(content)
    value = parse_yaml(text.encode(), origin=origin)
    for part in sections:
        child = inner.get(part)
        if child is not None and not isinstance(child, dict):
            raise ConfigError(f"{origin}: {part} is not a section")
        inner[part] = inner = dict(child or {})
    inner[last] = value
    return changed
