"""A sweep on the runner of batch jobs: a training run is a shard, its result a file.

A run is skipped where its result is there, resumed where a checkpoint is, and tried again where
it failed.
"""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch

from mdiff.errors import BackendError, ConfigError
from mdiff.evaluation import sample_figures
from mdiff.files import locked, replace_file
from mdiff.files import sweep as remove_leftovers
from mdiff.pipeline import CallOptions, load
from mdiff.pipeline.batch import (
    ATTEMPTS,
    REQUEST_ERRORS,
    Division,
    agree,
    error_line,
    make_all,
)
from mdiff.sweeps.grid import Plan, Setting, TrainingRun
from mdiff.sweeps.summary import Result, Summary, summary, write_picture
from mdiff.training import LOG, STOPS, train

RUNS, SUMMARY, PICTURE, FAILURES = "runs", "sweep.json", "sweep.svg", "failures.jsonl"


@dataclass(frozen=True)
class RunShard:
    """A run with its directory and the file of its result beside it; it is its only item."""

    run: TrainingRun
    folder: Path
    samplings: list[Setting]
    num_samples: int
    count: ClassVar[int] = 1

    def __str__(self) -> str:
        return str(self.run)

    @property
    def number(self) -> int:
        """Its number among all runs."""
        return self.run.number

    @property
    def path(self) -> Path:
        """The file of the result."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def result(self) -> Result | None:
        """What is there of this run, None where nothing is."""
        try:
            found = Result.model_validate_json(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        return found if found.fingerprint == self.run.fingerprint else None

    def is_complete(self) -> bool:
        """Whether there is a result that is no error."""
        found = self.result()
        return found is not None and found.error is None

    def clear(self) -> None:
        """Remove what a killed writer left, and an error: the run is tried again."""
        self.path.parent.mkdir(exist_ok=True)
        remove_leftovers(self.path.parent, f"{self.path.name}.")
        if not self.is_complete():
            self.path.unlink(missing_ok=True)

    def item(self, number: int) -> "RunShard":
        """The run itself."""
        return self

    def split(self, item: "RunShard") -> Sequence["RunShard"]:
        """A run has no parts."""
        return ()

    def failure(self, item: "RunShard", how: str) -> Result:
        """The result that says that the run crashes its workers."""
        return Result(error=f"{ATTEMPTS} workers crashed at it alone, the last by {how}")

    def write(self, results: Sequence[Result]) -> None:
        """Write the file of the result."""
        result = results[0].model_copy(update={"fingerprint": self.run.fingerprint})
        replace_file(self.path, [result.model_dump_json(indent=1).encode() + b"\n"])


@dataclass(frozen=True)
class Trainer:
    """Trains in a worker; `gpus` is how many it needs."""

    gpus: int

    def open(self, worker: int) -> Callable[[RunShard], Result]:
        """Choose the worker's GPU, of several the next one."""
        if torch.cuda.device_count() > 1:
            torch.cuda.set_device(worker % torch.cuda.device_count())
        # Signals are for its parent to answer; a killed run is resumed. No step is reported.
        return partial(make_run, stops=(), report=lambda line: None)


def make_run(
    shard: RunShard, *, report: Callable[[str], None], stops: Sequence[signal.Signals] = STOPS
) -> Result:
    """The result of a run, which is trained from where its checkpoint stands; or its error.

    Raises what is no fault of the recipe: BackendError, and errors of the disk or the memory.
    """
    try:
        path = train(shard.run.recipe, shard.folder, report=report, stops=stops)
        bits, stderr = _last_bound(shard.folder / LOG)
        drawn = [_figures(path, each, shard.num_samples) for each in shard.samplings]
    except BackendError:
        raise
    except REQUEST_ERRORS as error:
        return Result(error=error_line(error))
    return Result(bits=bits, stderr=stderr, samples=drawn)


def _last_bound(log: Path) -> tuple[float, float]:
    """The last validation of a log and its standard error."""
    lines = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    found = [[v for k, v in line.items() if k.startswith("validation_")] for line in lines]
    bits, stderr = list(filter(None, found))[-1]
    return bits, stderr


def _figures(path: Path, sampling: Setting, num_samples: int) -> dict[str, float | None]:
    """Figures of samples of a checkpoint; nothing in them depends on the clock."""
    pipeline = load(str(path))
    canvases = pipeline.canvases(num_samples=num_samples, length=pipeline.window)
    runs = pipeline.runs(canvases, **cast(CallOptions, {"seed": 0, **sampling}))
    found = sample_figures([sample for run in runs for sample in run.finished()])
    del found["samples"], found["seconds"]
    return cast(dict[str, float | None], found)


def run_sweep(
    plan: Plan, out: Path, *, division: Division | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary | None:  # fmt: skip
    """Make the runs of a plan that are not complete in `out`, and collect them all.

    None where other processes have still to make their share. Writes sweep.json, sweep.svg and
    failures.jsonl. Raises ConfigError for another sweep's folder, CheckpointError while another
    process makes the same share, BackendError where the engine is not there.
    """
    division = division or Division()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "WORLD_SIZE is set, as by a launcher: each run of a sweep is one process; start it "
            "without, or as an array of jobs with --shard K/N"
        )
    runs = out.resolve() / RUNS
    shards = [
        RunShard(run, runs / f"run-{run.number:04d}", plan.samplings, plan.num_samples)
        for run in plan.runs
    ]
    maker = Trainer(int(torch.cuda.is_available()))
    with locked(out, division.share.lock):
        if division.share.count == 1:
            remove_leftovers(out)
        agree(plan.record, out)
        make_all(shards, partial(make_run, report=report), maker, division, report=report)
        results = [result for shard in shards if (result := shard.result()) is not None]
        if len(results) < len(shards):
            report(f"other runs of {out} are not complete yet: their processes go on")
            return None
        found = summary(plan, results)
        replace_file(out / FAILURES, [json.dumps(f).encode() + b"\n" for f in found.failures])
        replace_file(out / SUMMARY, [json.dumps(found.content(), indent=1).encode() + b"\n"])
        write_picture(found, out / PICTURE)
        return found
