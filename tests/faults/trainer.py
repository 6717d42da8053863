"""Trains the toy recipe in a process that a test may kill at any moment, and says how far it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from toy_training import recipe

import mdiff.training.loop as training


def say(line: str) -> None:
    """One write, so that lines of several threads do not mix."""
    os.write(2, f"{line}\n".encode())


def reported(out: str, settings: dict[str, Any]) -> None:
    """Say "started", "first N" at the first step, "saved N" after each save, and "done"."""
    say("started")
    write, first = training.write_checkpoint, []

    def written(run: Any, out: Path, number: int, *rest: Any) -> None:
        write(run, out, number, *rest)
        say(f"saved {number}")

    def report(line: str) -> None:
        # The first progress line is that of the first step.
        if line.startswith("step ") and not first:
            first.append(line)
            say(f"first {line.split()[1].split('/')[0]}")

    training.write_checkpoint = written
    training.train(recipe(**settings), out, report=report)
    say("done")
