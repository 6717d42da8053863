"""Kill -9 at random moments: every restart is valid and never older than the last save."""

from __future__ import annotations

import random
import signal
import threading

import processes
import pytest
from figures import record
from toy_training import QUIET, log, recipe, same, tensors
from trainer import reported

from mdiff.files.atomic import latest, step_path, steps, verify
from mdiff.training.loop import train

SETTINGS = {"steps": 100, "save_every": 4, "keep": 3, "log__every": 1000}
# A run of the toy takes a fraction of this; the moment of the kill is spread over it.
LONGEST = 0.4


def killed(out, seconds):
    """Start a run, kill it after `seconds` of steps; what it said, by lines of two words."""
    said, timer = [], None
    with processes.forked(reported, str(out), SETTINGS) as process:
        for line in process.stderr:
            word, _, rest = line.strip().partition(" ")
            # One in five is killed while it is being built, the others among their steps.
            if timer is None and word == ("started" if seconds < LONGEST / 5 else "first"):
                timer = threading.Timer(seconds, process.kill)
                timer.start()
            if word == "done" and timer is not None:
                timer.cancel()
            said.append((word, rest))
        process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said
    return said


def newest(out):
    found = latest(out)
    return 0 if found is None else int(found.name.removeprefix("step-"))


def killed_often(tmp_path, trials):
    """Kill runs in one directory after another; how many trials died within the training."""
    whole = train(recipe(**SETTINGS), tmp_path / "whole", **QUIET)
    chance = random.Random(7)
    died = finished = amid = stepped = 0
    out, last = tmp_path / "0", 0
    while died < trials:
        said = killed(out, chance.uniform(0, LONGEST))
        words = dict(said)
        if "first" in words:
            # It went on from the last completed save; of a finished run it names the last step.
            assert int(words["first"]) == min(last + 1, SETTINGS["steps"])
        saved = [int(step) for word, step in said if word == "saved"]
        if "done" in words:
            assert same(tensors(whole), tensors(step_path(out, SETTINGS["steps"])))
            assert [r["step"] for r in log(out)] == list(range(1, SETTINGS["steps"] + 1))
            finished += 1
            out, last = tmp_path / str(finished), 0
            continue
        died += 1
        stepped += "first" in words
        amid += any(path.name.endswith(".tmp") for path in out.iterdir()) if out.exists() else 0
        found = newest(out)
        assert found >= max([last, *saved])
        for step in steps(out):
            verify(step_path(out, step))
        last = found
    resumed = train(recipe(**SETTINGS), out, **QUIET)
    assert same(tensors(whole), tensors(resumed))
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    return {
        "trials": died,
        "after a step": stepped,
        "within a save": amid,
        "runs finished": finished,
    }


def test_8_kills_lose_nothing(tmp_path):
    record("kills, short", killed_often(tmp_path, 8))


@pytest.mark.faults
def test_200_kills_lose_nothing(tmp_path):
    record("kills", killed_often(tmp_path, 200))


def cuts(tmp_path, count, settings):
    """Resume copies of one run from random checkpoints; each must end as the whole one did."""
    whole = train(recipe(**settings), tmp_path / "whole", **QUIET)
    points = random.Random(3).sample(range(1, settings["steps"]), count)
    for cut in points:
        out = tmp_path / f"cut {cut}"
        source = step_path(tmp_path / "whole", cut)
        once = recipe(**settings | {"save_every": 1000})
        resumed = train(once, out, resume=str(source), **QUIET)
        assert same(tensors(whole), tensors(resumed)), cut
        assert log(out) == log(tmp_path / "whole")[cut:], cut


SAVED = {"save_every": 1, "keep": None}


def test_runs_resumed_at_4_random_steps_are_bitwise_the_uninterrupted_one(tmp_path):
    cuts(tmp_path, 4, {"steps": 8, **SAVED})


@pytest.mark.faults
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_runs_resumed_at_20_random_steps_are_bitwise_the_uninterrupted_one(tmp_path, micro_batch):
    cuts(tmp_path, 20, {"steps": 24, "micro_batch": micro_batch, **SAVED})
