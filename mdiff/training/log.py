"""A run's log: every step as a JSON line, some as a console line, TensorBoard as an option."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.errors import BackendError, CheckpointError
from mdiff.files import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from mdiff.training.step import Outcome

LOG = "log.jsonl"


def to_stderr(line: str) -> None:
    """Print a progress line to stderr."""
    print(line, file=sys.stderr, flush=True)


class Journal:
    """Writes `log.jsonl` of a run, from after step `start`; lines of later steps are dropped.

    `report` gets a readable line at the first, at every `every`-th and at the last step, with
    losses averaged since the line before.
    """

    def __init__(
        self, directory: Path, *, start: int, steps: int, every: int, unit: str,
        tensorboard: bool = False, report: Callable[[str], None] = to_stderr,
    ) -> None:  # fmt: skip
        self.steps, self.every, self.unit, self.report = steps, every, unit, report
        self.start = start
        path = directory / LOG
        _truncate(path, start)
        self._board = _tensorboard(directory, start) if tensorboard else None
        self._file = path.open("a", encoding="utf-8")
        self._window: list[Outcome] = []
        self._began = self._window_began = time.perf_counter()

    def step(self, outcome: Outcome) -> None:
        """Log one step."""
        json.dump(outcome.as_json(self.unit), self._file)
        self._file.write("\n")
        self._file.flush()
        step = outcome.step
        if outcome.bad_rows:
            self.report(f"step {step}/{self.steps} skipped: not finite in rows {outcome.bad_rows}")
        else:
            self._window.append(outcome)
        if step % self.every == 0 or step in (self.start + 1, self.steps):
            self._line(step)

    def _line(self, step: int) -> None:
        if not self._window:
            return
        now, count = time.perf_counter(), len(self._window)
        loss = sum(each.loss for each in self._window) / count
        bits = sum(each.bits for each in self._window) / count
        tokens = sum(each.tokens for each in self._window)
        speed = tokens / max(now - self._window_began, 1e-9)
        left = (now - self._began) / (step - self.start) * (self.steps - step)
        self.report(
            f"step {step}/{self.steps}  loss {loss:.4f} nats/token  {bits:.3f} bits/{self.unit}  "
            f"{speed:,.0f} tokens/s  ETA {_clock(left)}"
        )
        if self._board is not None:
            last = self._window[-1]
            shown = {"loss": loss, f"bits_per_{self.unit}": bits, "lr": last.lr}
            shown |= {"grad_norm": last.grad_norm, "tokens_per_second": speed}
            for key, value in shown.items():
                self._board.add_scalar(key, value, step)
        self._window, self._window_began = [], now

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


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


def _tensorboard(directory: Path, start: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BackendError(
            "log.tensorboard needs the package tensorboard: pip install tensorboard"
        ) from error
    return SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(3725)
    '1:02:05'
    """
    whole = math.ceil(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
