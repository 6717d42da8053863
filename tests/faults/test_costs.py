"""What survival costs: the stall of a save, the time of a stop, the gain of a second process.

They are times: run them where nothing else runs (`make faults` does, one test after another).
"""

from __future__ import annotations

import json
import signal
import statistics
import sys
import time
from pathlib import Path

import processes
import pytest
from figures import record
from folders import ACCELERATE

from mdiff.files.atomic import latest, verify

COSTS = Path(__file__).parent / "costs.py"
CPU = ACCELERATE / "cpu.yaml"
# 49 million weights of ten layers, in one row of 64 bytes: the shortest steps such a model has.
LARGE = {"width": 640, "depth": 10, "length": 64, "batch_size": 1, "ema": 0.99}
SAVE_EVERY = 100
# Steps after a save that may wait for it; those after them are the undisturbed ones.
AFTER = 15


def training(out, settings, launcher=(sys.executable,)):
    """The words of a training process of one thread a process."""
    return [*launcher, COSTS, out, json.dumps(settings)]


def times_of(words):
    """When each step ended, seconds by its number."""
    done = processes.run(words, timeout=1200, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["step"]: row["at"] for row in rows if "step" in row}


@pytest.mark.faults
def test_a_save_stalls_the_steps_by_at_most_5_percent(tmp_path):
    settings = LARGE | {"steps": 2 * SAVE_EVERY, "save_every": SAVE_EVERY}
    at = times_of(training(tmp_path / "run", settings))
    took = {step: at[step] - at[step - 1] for step in at if step > 1}
    usual = statistics.median(took[s] for s in range(SAVE_EVERY + AFTER, 2 * SAVE_EVERY))
    waited = sum(took[s] - usual for s in range(SAVE_EVERY + 1, SAVE_EVERY + AFTER))
    share = waited / (SAVE_EVERY * usual)
    record("stall of a save", {"seconds a step": usual, "waited": waited, "share": share})
    assert share <= 0.05


@pytest.mark.faults
def test_a_sigterm_ends_in_a_whole_checkpoint_within_30_seconds(tmp_path):
    took = []
    for after in (3, 6):
        out = tmp_path / f"{after}"
        words = training(out, LARGE | {"steps": 10**6, "save_every": 10**6})
        with processes.running(words) as process:
            for line in process.stdout:
                if json.loads(line).get("step") == after:
                    break
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.communicate()
            took.append(time.monotonic() - asked)
        verify(latest(out))
    record("SIGTERM to the end, 49 million weights", {"seconds": took})
    assert max(took) <= 30


@pytest.mark.faults
def test_two_processes_have_1_6_times_the_throughput_of_one(tmp_path):
    settings = {"width": 256, "depth": 8, "length": 192, "batch_size": 24, "steps": 16,
                "save_every": 100}  # fmt: skip
    seconds = {}
    for name, launcher in (("one", [sys.executable]), ("two", processes.launcher(CPU))):
        at = times_of(training(tmp_path / name, settings, launcher))
        # The first steps warm up, the last one saves.
        took = [at[step] - at[step - 1] for step in range(4, 16)]
        seconds[name] = statistics.median(took)
    gain = seconds["one"] / seconds["two"]
    record("throughput of two processes", seconds | {"gain": gain})
    assert gain >= 1.6
