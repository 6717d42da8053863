"""Asynchronous checkpoints: one at a time, and none of their errors is lost."""

from __future__ import annotations

import os
import sys
import threading

import pytest
from toy_training import QUIET, log, recipe, same, tensors

import mdiff.training.loop as training
from mdiff.cli import explained
from mdiff.files.atomic import step_path, steps, verify
from mdiff.training.async_save import Writer
from mdiff.training.loop import train


def test_a_job_begins_when_the_one_before_has_ended():
    release, order = threading.Event(), []

    def slow():
        release.wait(10)
        order.append("slow")

    with Writer() as writer:
        writer.begin(slow)
        assert order == []
        threading.Timer(0.05, release.set).start()
        writer.begin(lambda: order.append("next"))
        writer.finish()
    assert order == ["slow", "next"]


def test_the_exception_of_a_job_is_raised_once_by_the_next_call():
    def fail():
        raise OSError(28, "No space left on device")

    with Writer() as writer:
        assert not writer.failed
        writer.begin(fail)
        writer._job.exception()
        assert writer.failed
        with pytest.raises(OSError, match="No space"):
            writer.begin(lambda: None)
        assert not writer.failed
        writer.finish()


def test_leaving_waits_for_the_job():
    done = []
    with Writer() as writer:
        writer.begin(lambda: done.append(threading.Event().wait(0.05)))
    assert len(done) == 1


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_the_writer_has_a_lower_priority_where_threads_can_and_the_trainer_never_has():
    before, found = niceness(), []
    with Writer() as writer:
        writer.begin(lambda: found.append(niceness()))
    assert (found[0] > before) is (sys.platform == "linux")
    assert niceness() == before


def test_a_save_that_fails_ends_the_run_soon_and_the_one_before_stays(tmp_path, monkeypatch):
    write = training.write_checkpoint

    def refuse(run, out, number, state, best):
        if number == 6:
            raise OSError(28, "No space left on device")
        write(run, out, number, state, best)

    settings = {"steps": 400, "save_every": 3, "keep": 1}
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_checkpoint", refuse)
        with pytest.raises(OSError, match="No space") as caught:
            train(recipe(**settings), tmp_path / "run", **QUIET)
    assert explained(caught.value)[0] == 6
    assert steps(tmp_path / "run") == [3]
    verify(step_path(tmp_path / "run", 3))
    # The next save is due at step 9: whether or not a step noticed before, none is later.
    assert log(tmp_path / "run")[-1]["step"] <= 9
    short = {**settings, "steps": 12}
    whole = train(recipe(**short), tmp_path / "whole", **QUIET)
    assert same(tensors(whole), tensors(train(recipe(**short), tmp_path / "run", **QUIET)))


def test_what_is_saved_is_the_state_of_its_step_however_long_writing_takes(tmp_path, monkeypatch):
    """Steps go on while a save is held up: it must not hold what they change."""
    write = training.write_checkpoint

    def late(run, out, number, state, best):
        threading.Event().wait(0.2)
        write(run, out, number, state, best)

    settings = {"steps": 6, "save_every": 2, "keep": None}
    whole = train(recipe(**settings), tmp_path / "whole", **QUIET)
    monkeypatch.setattr(training, "write_checkpoint", late)
    train(recipe(**settings), tmp_path / "late", **QUIET)
    for step in (2, 4, 6):
        assert same(*(tensors(step_path(tmp_path / name, step)) for name in ("whole", "late")))
    assert whole.name == "step-000006"
