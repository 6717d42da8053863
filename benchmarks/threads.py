"""Processor time and clock of one command, by how many threads it has and how they wait.

    python benchmarks/threads.py [--repeats 3] [--quota FOLDER]

`mdiff generate builtin:emoji` with one thread, as the command sets it, and with two threads that
spin as OpenMP does by itself; each on an idle machine and beside two busy processes. --quota names
the folder of a control group of one CPU, in which it runs as well. Rounds are interleaved; the
median of each counts.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from machine import record

COMMAND = (
    "generate", "builtin:emoji", "--prompt", "grinning face", "--sampler", "halton", "--steps", "8",
    "--num-samples", "4", "--seed", "1",
)  # fmt: skip
# 300,000 turns is what OpenMP's library waits by itself.
KINDS = {
    "one_thread": {"OMP_NUM_THREADS": "1"},
    "as_set": {},
    "spinning": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},
}
CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def seconds(choice: dict[str, str], out: Path, enter: Callable[[], None] | None) -> list[float]:
    """Clock and processor seconds of one run of the command."""
    environ = {name: value for name, value in os.environ.items() if name not in CHOICES} | choice
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "mdiff", *COMMAND, "--out", str(out)],
        env=environ, check=True, capture_output=True, preexec_fn=enter,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [time.perf_counter() - start, used]


def joins(group: Path) -> Callable[[], None]:
    """What a child calls to enter a control group."""

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return enter


def main() -> None:
    """Print and record the medians and their ratios to one thread alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quota", type=Path)
    options = parser.parse_args()
    states: dict[str, tuple[int, Callable[[], None] | None]] = {
        "idle": (0, None),
        "busy": (2, None),
    }
    if options.quota:
        states["quota"] = (0, joins(options.quota))
    figures: dict[str, Any] = {"command": " ".join(COMMAND), "repeats": options.repeats}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "grid.png"
        seconds({}, out, None)
        for state, (busy, enter) in states.items():
            found: dict[str, list[list[float]]] = {name: [] for name in KINDS}
            with ExitStack() as stack:
                for _ in range(busy):
                    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    stack.callback(other.wait)
                    stack.callback(other.kill)
                for _ in range(options.repeats):
                    for name, choice in KINDS.items():
                        found[name].append(seconds(choice, out, enter))
            for name, runs in found.items():
                clock, used = (statistics.median(each) for each in zip(*runs, strict=True))
                figures[f"{state}_{name}"] = {"clock_s": clock, "processor_s": used, "runs": runs}
    alone = figures["idle_one_thread"]["processor_s"]
    for name, figure in figures.items():
        if isinstance(figure, dict):
            figure["processor_to_one_thread_alone"] = ratio = figure["processor_s"] / alone
            print(
                f"{name}: {figure['clock_s']:.2f} s, processor {figure['processor_s']:.2f} s, "
                f"{ratio:.2f} of one thread alone"
            )
    record("threads", figures)


if __name__ == "__main__":
    main()
