"""The runs of a sweep: a recipe with every combination of a grid's values, at several seeds.

A plan is a function of the recipe, the grid and the data alone: every process makes the same.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from mdiff.errors import BackendError, ConfigError, MdiffError
from mdiff.files import parse_yaml
from mdiff.modalities import Modality
from mdiff.pipeline import check_sampler
from mdiff.tokens import Examples
from mdiff.training import Recipe, Size, load_recipe, medium_of, size_of, values

FORMAT = 1
# Of the keys of a grid that are options of sampling from a trained model.
SAMPLE = "sample."
# More is a slip: a training run takes minutes at least.
MOST_RUNS = 1000

Setting = dict[str, object]


@dataclass(frozen=True)
class TrainingRun:
    """A recipe with the grid's values `setting` and a seed; `size` is None where it has none.

    `fingerprint` is that of recipe and data: a result with the same is of this run.
    """

    number: int
    setting: Setting
    seed: int
    recipe: Recipe
    size: Size | None
    fingerprint: str

    def __str__(self) -> str:
        return f"run {self.number}, {named({**self.setting, 'seed': self.seed})}"

    @property
    def scale(self) -> tuple[int, int]:
        """The parameters without embeddings, and the tokens of all steps."""
        if self.size is None:
            return 0, 0
        steps = self.recipe.train.steps
        return self.size.parameters - self.size.embeddings, self.size.tokens * steps


@dataclass(frozen=True)
class Plan:
    """What is to be made; `record` is what a later command must agree with, `unit` that of bounds.

    `samplings` are the settings of sampling, `fit` says whether a scaling law is to be fitted.
    """

    record: dict[str, object]
    grid: dict[str, list[object]]
    runs: list[TrainingRun]
    samplings: list[Setting]
    num_samples: int
    unit: str
    fit: bool


def planned(
    recipe: Path, grid: Sequence[str], *, overrides: Sequence[str] = (), seeds: int = 1,
    num_samples: int = 32, fit: bool = False,
) -> Plan:  # fmt: skip
    """The plan of a grid such as ["model.width=64,128", "train.steps=400"] over a recipe's file.

    Seeds count up from the recipe's. Keys that begin with "sample." are options of sampling:
    `num_samples` samples are drawn with each combination of them from each trained model.

    Raises, before anything is trained, ConfigError for an invalid key, grid or recipe, and what
    building raises for a value with which no run can be built.
    """
    if seeds < 1 or num_samples < 1:
        raise ConfigError(f"seeds={seeds}, samples={num_samples}: need at least 1")
    axes = parse_grid(grid, overrides)
    if "train.seed" in axes:
        raise ConfigError("--grid train.seed: give the number of seeds by --seeds")
    drawn = {key: given for key, given in sorted(axes.items()) if key.startswith(SAMPLE)}
    trained = {key: given for key, given in axes.items() if key not in drawn}
    count = math.prod(map(len, trained.values())) * seeds
    if count > MOST_RUNS:
        raise ConfigError(f"{count:,} runs: expected at most {MOST_RUNS:,}; give fewer values")
    bare = {key.removeprefix(SAMPLE): given for key, given in drawn.items()}
    samplings = _combined(bare) if drawn else []
    for sampling in samplings:
        check_sampler(sampling)
    base = load_recipe(recipe, overrides)
    runs = _runs(recipe, overrides, trained, range(base.train.seed, base.train.seed + seeds))
    if fit and len({run.scale for run in runs if run.size is not None}) == 1:
        raise ConfigError(
            "--fit scaling: neither the parameters nor the tokens change in this grid: give "
            "values of model.width, model.depth or train.steps"
        )
    units = sorted({run.size.unit for run in runs if run.size is not None})
    if len(units) > 1:
        raise ConfigError(f"bounds in bits per {' and '.join(units)} cannot be compared")
    record = {
        "format": FORMAT, "grid": axes, "seeds": seeds, "recipe": _fixed(base),
        "samples": num_samples if samplings else None,
    }  # fmt: skip
    return Plan(record, axes, runs, samplings, num_samples, units[0], fit)


def parse_grid(words: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, list[object]]:
    """The values by key of words such as "model.width=64,128"; each value is YAML.

    >>> parse_grid(["model.width=64,128", "optim.betas=[0.9, 0.95]"])
    {'model.width': [64, 128], 'optim.betas': [[0.9, 0.95]]}
    """
    found: dict[str, list[object]] = {}
    taken = [override.partition("=")[0].strip() for override in overrides]
    for word in words:
        key, equals, text = word.partition("=")
        name, key = f"--grid {word[:80]!r}", key.strip()
        given = parse_yaml(f"[{text}]".encode(), origin=name) if equals else None
        if not all(key.split(".")) or not isinstance(given, list) or not given:
            raise ConfigError(f"{name}: expected section.key=value,value")
        for other in taken:
            # A key, or a section of it.
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                raise ConfigError(f"{name}: {other[:80]} is given too: a key is given once")
        if len(set(map(_text, given))) < len(given):
            raise ConfigError(f"{name}: a value is given twice")
        taken.append(key)
        found[key] = given
    if not found:
        raise ConfigError("the grid is empty: give --grid section.key=value,value")
    return found


def _combined(axes: Mapping[str, Sequence[object]]) -> list[Setting]:
    """Each combination of values, the last key changing fastest."""
    return [dict(zip(axes, chosen)) for chosen in product(*axes.values())]


def _runs(
    path: Path, overrides: Sequence[str], axes: Mapping[str, Sequence[object]], seeds: range
) -> list[TrainingRun]:
    """The runs of a grid; raises the error of a value with which none can be built."""
    runs: list[TrainingRun] = []
    errors: list[tuple[Setting, MdiffError]] = []
    media: dict[str, tuple[Modality, Examples]] = {}
    for setting in _combined(axes):
        given = [*overrides, *(f"{key}={_text(value)}" for key, value in setting.items())]
        recipes = [_measured(load_recipe(path, [*given, f"train.seed={seed}"])) for seed in seeds]
        size = None
        try:
            medium = _text([recipes[0].data.model_dump(), recipes[0].modality.model_dump()])
            if medium not in media:
                media[medium] = medium_of(recipes[0])
            size = size_of(recipes[0], *media[medium])
        except BackendError:
            raise
        except MdiffError as error:
            errors.append((setting, error))
        for seed, recipe in zip(seeds, recipes):
            content = _text([_fixed(recipe), size and asdict(size)]).encode()
            digest = hashlib.sha256(content).hexdigest()
            runs.append(TrainingRun(len(runs), setting, seed, recipe, size, digest))
    built = {(k, _text(v)) for run in runs if run.size for k, v in run.setting.items()}
    for setting, refusal in errors:
        if not built or not {(k, _text(v)) for k, v in setting.items()} <= built:
            raise refusal
    return runs


def _measured(recipe: Recipe) -> Recipe:
    """The recipe with a validation at the end; ConfigError where it has no rows for one."""
    if not recipe.data.options.get("validation"):
        raise ConfigError(
            "a sweep compares bounds of validation rows: set data.validation, the share of the "
            "data for them, such as --set data.validation=0.05"
        )
    every = {"validate_every": recipe.train.validate_every or recipe.train.steps}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=every)})


def _fixed(recipe: Recipe) -> dict[str, object]:
    """The values of a recipe on which its result depends."""
    return {key: value for key, value in values(recipe).items() if not key.startswith("log.")}


def named(setting: Mapping[str, object]) -> str:
    """The setting in a line.

    >>> named({"train.steps": 400, "model.name": "transformer"})
    'train.steps=400 model.name=transformer'
    """
    return " ".join(f"{key}={plain(value)}" for key, value in setting.items())


def plain(value: object) -> str:
    """A value as people write it."""
    return value if isinstance(value, str) else _text(value)


def _text(value: object) -> str:
    """A value as JSON, which YAML reads as the same."""
    return json.dumps(value, sort_keys=True)
