"""A run's log: every step as a JSON line, some as a console line and by accelerate's trackers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker

from mdiff.errors import BackendError, CheckpointError, ConfigError, nearest
from mdiff.files import Curve, replace_file, write_curves
from mdiff.find import find
from mdiff.training.recipe import Log

if TYPE_CHECKING:
    from mdiff.training.step import Outcome
    from mdiff.training.validation import Validation

LOG, CURVE = "log.jsonl", "curve.svg"
# The weight of a step in the running mean of a curve.
SMOOTHING = 0.1
# Each needs the package of its name.
TRACKERS: dict[str, type[GeneralTracker]] = {
    "tensorboard": TensorBoardTracker, "trackio": TrackioTracker
}  # fmt: skip


def to_stderr(line: str) -> None:
    """Print a progress line to stderr; one that nobody can read is lost, and nothing else."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


class Journal:
    """Writes `log.jsonl` of a run, from after step `start`; lines of later steps are dropped.

    `report` gets a readable line at the first, at every `every`-th and at the last step, with
    losses averaged since the line before; the started `trackers` get its numbers.
    """

    def __init__(
        self, directory: Path, *, start: int, steps: int, every: int, unit: str,
        trackers: Sequence[GeneralTracker] = (), report: Callable[[str], None] = to_stderr,
    ) -> None:  # fmt: skip
        self.start, self.steps, self.every = start, steps, every
        self.unit, self.report, self._trackers = unit, report, trackers
        self.path = directory / LOG
        _truncate(self.path, start)
        self._file = self.path.open("a", encoding="utf-8")
        self._window: list[Outcome] = []
        self._began = self._window_began = time.perf_counter()

    def step(self, outcome: Outcome) -> None:
        """Log one step."""
        step = outcome.step
        self._write(outcome.as_json(self.unit))
        if outcome.bad_rows:
            self.report(f"step {step}/{self.steps} skipped: not finite in rows {outcome.bad_rows}")
        else:
            self._window.append(outcome)
        if step % self.every == 0 or step in (self.start + 1, self.steps):
            self._line(step)

    def validated(self, found: Validation, *, is_best: bool) -> None:
        """Log the bound of the validation rows."""
        self._write(found.as_json(self.unit))
        self.report(
            f"step {found.step}/{self.steps}  validation {found.bits:.4f} ± {found.stderr:.4f} "
            f"bits/{self.unit}{', the best so far' if is_best else ''}"
        )
        self._track({f"validation_bits_per_{self.unit}": found.bits}, found.step)

    def curve(self, best: Validation | None) -> None:
        """Write `curve.svg`, bits a unit by step, and say which checkpoint is the best."""
        if best is not None:
            self.report(f"the best: step {best.step}, {best.bits:.4f} bits/{self.unit}")
        names = {f"bits_per_{self.unit}": "training, running mean"}
        names[f"validation_bits_per_{self.unit}"] = "validation"
        write_curves(
            [Curve(label, points) for name, label in names.items()
             if (points := _points(self.path, name))],
            self.path.with_name(CURVE), x="step", y=f"bits per {self.unit}",
        )  # fmt: skip

    def _write(self, record: Mapping[str, object]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def _line(self, step: int) -> None:
        if not self._window:
            return
        now, count = time.perf_counter(), len(self._window)
        loss = sum(each.loss for each in self._window) / count
        bits = sum(each.bits for each in self._window) / count
        speed = sum(each.tokens for each in self._window) / max(now - self._window_began, 1e-9)
        left = (now - self._began) / (step - self.start) * (self.steps - step)
        self.report(
            f"step {step}/{self.steps}  loss {loss:.4f} nats/token  {bits:.3f} bits/{self.unit}  "
            f"{speed:,.0f} tokens/s  ETA {_clock(left)}"
        )
        last = self._window[-1]
        shown = {"loss": loss, f"bits_per_{self.unit}": bits, "lr": last.lr}
        self._track(shown | {"grad_norm": last.grad_norm, "tokens_per_second": speed}, step)
        self._window, self._window_began = [], now

    def _track(self, shown: Mapping[str, float], step: int) -> None:
        with _quiet():
            for tracker in self._trackers:
                tracker.log(dict(shown), step=step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        with _quiet():
            for tracker in self._trackers:
                tracker.finish()


def _points(path: Path, name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of a log with that name; a training value is a running mean."""
    found: list[tuple[float, float]] = []
    for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        value = record.get(name, 0)
        if value > 0:
            mean = found[-1][1] if found and name.startswith("bits") else value
            found.append((float(record["step"]), mean + (value - mean) * SMOOTHING))
    return found


def _truncate(path: Path, start: int) -> None:
    """Keep the complete lines of steps up to `start`."""
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise CheckpointError(f"{path} is not a plain file")
    kept = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            if record["step"] <= start and line.endswith("\n"):
                kept.append(line)
    replace_file(path, (line.encode() for line in kept))


def tracker_classes(settings: Log) -> dict[str, type[GeneralTracker]]:
    """The class of each tracker that a recipe names.

    Raises ConfigError for what is no tracker, BackendError where its package is missing.
    """
    found: dict[str, type[GeneralTracker]] = {}
    for name in [*settings.trackers, *["tensorboard"] * settings.tensorboard]:
        kind = find("trackers", name) if ":" in name else TRACKERS.get(name)
        if kind is None:
            raise ConfigError(f"log.trackers: unknown tracker {name!r}; {nearest(name, TRACKERS)}")
        if not (isinstance(kind, type) and issubclass(kind, GeneralTracker)):
            raise ConfigError(f"log.trackers: {name!r} is not a class of accelerate's trackers")
        if name in TRACKERS and find_spec(name) is None:
            raise BackendError(f"log.trackers: {name} is not installed: pip install {name}")
        found[name] = kind
    return found


def start_trackers(
    log: Log, directory: Path, *, start: int, settings: Mapping[str, object]
) -> list[GeneralTracker]:
    """Trackers of the run in `directory` from after step `start`; `settings` are its recipe's."""
    run = directory.resolve()
    options: dict[str, dict[str, object]] = {
        # The steps that are run again replace those that are there.
        "tensorboard": {"run_name": "tensorboard", "purge_step": start + 1},
        # Runs whose directories lie side by side are of one project.
        "trackio": {"run_name": run.parent.name or "mdiff", "name": run.name, "resume": "allow"},
    }
    made = []
    with _quiet():
        for name, kind in tracker_classes(log).items():
            given = options.get(name, {"run_name": run.name})
            if kind.requires_logging_directory:
                given["logging_dir"] = run
            tracker = kind(**given)
            tracker.start()
            if not start:
                plain = {k: str(v) if isinstance(v, list) else v for k, v in settings.items()}
                tracker.store_init_configuration(plain)
            made.append(tracker)
    return made


def _quiet() -> contextlib.AbstractContextManager[object]:
    """Within it what goes to stdout, which carries results, goes to stderr: trackers print."""
    return contextlib.redirect_stdout(sys.stderr)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725)
    '1:02:05'
    """
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
