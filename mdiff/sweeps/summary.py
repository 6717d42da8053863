"""What a sweep found: bounds with standard errors, differences at paired seeds, a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from pydantic import BaseModel

from mdiff.errors import MdiffError
from mdiff.files import STRICT, Curve, write_curves
from mdiff.sweeps.grid import SAMPLE, Plan, Setting, TrainingRun, named, plain
from mdiff.sweeps.scaling import Scaling, fit_scaling

# A mean over seeds and its standard error, None where there is none of a single seed.
Estimate = tuple[float, float | None]
# The figures of samples that the table shows.
SHOWN = ("calls", "draw_entropy_nats", "unigram_entropy_bits", "distinct_2")


class Result(BaseModel):
    """What a run leaves: its bound after the last step in bits a unit, or the `error` it had.

    `samples` are the figures of samples, one of each setting; `fingerprint` is the run's.
    """

    model_config = STRICT

    fingerprint: str = ""
    bits: float = 0.0
    stderr: float = 0.0
    samples: list[dict[str, float | None]] = []
    error: str | None = None


@dataclass(frozen=True)
class Point:
    """A combination of the grid's values, over the `seeds` of the runs that are complete.

    `bits` is the bound, `difference` that to the best point's at the seeds that both have;
    `samples` are figures, one mapping for each setting of sampling.
    """

    setting: Setting
    seeds: list[int]
    parameters: int
    tokens: int
    bits: Estimate | None
    difference: Estimate | None
    samples: list[dict[str, Estimate | None]]


@dataclass(frozen=True)
class Summary:
    """The points in the order of the grid, what failed, and the fit or why there is none."""

    plan: Plan
    points: list[Point]
    failures: list[dict[str, object]]
    fit: Scaling | str | None

    def content(self) -> dict[str, object]:
        """What sweep.json holds; `parameters` are without embeddings."""
        fit = asdict(self.fit) if isinstance(self.fit, Scaling) else self.fit
        found = {"points": list(map(asdict, self.points)), "failures": self.failures, "fit": fit}
        return self.plan.record | {"unit": self.plan.unit, "samplings": self.plan.samplings} | found


def estimate(values: Sequence[float], errors: Sequence[float | None]) -> Estimate:
    """The mean and its standard error: over the values, or that of a value that is alone.

    >>> estimate([1.0, 3.0], [0.1, 0.1])
    (2.0, 1.0)
    """
    if len(values) == 1:
        return values[0], errors[0]
    return fmean(values), stdev(values) / math.sqrt(len(values))


def summary(plan: Plan, results: Sequence[Result]) -> Summary:
    """The results of a plan's runs, in their order, collected."""
    pairs = list(zip(plan.runs, results))
    failures = [
        {"run": run.number, "setting": run.setting, "seed": run.seed, "error": result.error}
        for run, result in pairs
        if result.error is not None
    ]
    made = [(run, result) for run, result in pairs if result.error is None]
    # Not by equal settings: 1 and 1.0 are two values.
    seeds = len({run.seed for run in plan.runs})
    groups = [
        {run.seed: result for run, result in pairs[first : first + seeds] if result.error is None}
        for first in range(0, len(pairs), seeds)
    ]
    best = min(
        filter(None, groups), key=lambda group: fmean(r.bits for r in group.values()), default={}
    )
    points = [_point(run, found, best) for run, found in zip(plan.runs[::seeds], groups)]
    return Summary(plan, points, failures, _law(made) if plan.fit else None)


def _point(run: TrainingRun, found: Mapping[int, Result], best: Mapping[int, Result]) -> Point:
    """The point of the results `found` by seed, of which `run` is the first run."""
    pairs = [(found[seed], best[seed]) for seed in found if seed in best]
    # The same rows are hidden in the same ways: the true error of one pair is smaller than this.
    errors = [0.0 if a is b else math.hypot(a.stderr, b.stderr) for a, b in pairs]
    each = list(found.values())
    return Point(
        run.setting, list(found), *run.scale,
        estimate([r.bits for r in each], [r.stderr for r in each]) if each else None,
        estimate([a.bits - b.bits for a, b in pairs], errors) if pairs else None,
        [_figures(alike) for alike in zip(*(r.samples for r in each))],
    )  # fmt: skip


def _figures(alike: Sequence[Mapping[str, float | None]]) -> dict[str, Estimate | None]:
    """Figures over seeds."""
    known = {n: [v for each in alike if (v := each[n]) is not None] for n in alike[0]}
    return {name: estimate(values, [None]) if values else None for name, values in known.items()}


def _law(made: Sequence[tuple[TrainingRun, Result]]) -> Scaling | str:
    """The scaling law of runs with their results, or why they have none."""
    scales = [(*run.scale, result.bits) for run, result in made]
    try:
        return fit_scaling(*zip(*scales)) if scales else "no run is complete"
    except MdiffError as error:
        return str(error)


def table(found: Summary) -> list[str]:
    """The lines of a table: each point, its bound, its difference to the best, and the fit."""
    keys = list(found.points[0].setting)
    sampled = list(found.plan.samplings[0]) if found.plan.samplings else []
    heads = [*keys, f"bits/{found.plan.unit}", "to the best", "parameters", "tokens"]
    heads += [*(SAMPLE + key for key in sampled), *(SHOWN if sampled else ())]
    rows = [heads]
    for point in found.points:
        row = [plain(point.setting[key]) for key in keys]
        row += [_shown(point.bits), _shown(point.difference, sign="+")]
        row += [f"{point.parameters:,}", f"{point.tokens:,}"]
        rows += [row] if not point.samples else [
            [*row, *map(plain, own.values()), *(_shown(figures[name]) for name in SHOWN)]
            for own, figures in zip(found.plan.samplings, point.samples)
        ]  # fmt: skip
    rows = [row + [""] * (len(heads) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if isinstance(found.fit, str):
        return [*lines, f"no scaling law: {found.fit}"]
    if found.fit is not None:
        lines.append("L = E + A / N^a + B / D^b, N parameters, D tokens; 95 % intervals")
        for name, value in found.fit.values.items():
            low, high = found.fit.intervals[name]
            lines.append(f"{name} {value:10.4g}  {low:.4g} to {high:.4g}")
    return lines


def _shown(value: Estimate | None, *, sign: str = "") -> str:
    if value is None:
        return "-"
    mean, stderr = value
    return f"{mean:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def write_picture(found: Summary, path: Path) -> None:
    """The bounds over the numeric key of most values, a curve for each combination of the rest.

    Without such a key they are over the rows of the table.
    """
    numeric = [
        key for key in found.points[0].setting
        if all(type(v) in (int, float) and float(plain(v)) > 0 for v in found.plan.grid[key])
    ]  # fmt: skip
    across = max(numeric, key=lambda key: len(found.plan.grid[key]), default="")
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, point in enumerate(found.points, 1):
        if point.bits is not None:
            rest = {key: value for key, value in point.setting.items() if key != across}
            at = float(plain(point.setting[across])) if across else float(number)
            curves.setdefault(named(rest) or "bound", []).append((at, point.bits[0]))
    if curves:
        write_curves(
            [Curve(name, sorted(points)) for name, points in curves.items()], path,
            x=across or "row of the table", y=f"bits per {found.plan.unit}",
        )  # fmt: skip
