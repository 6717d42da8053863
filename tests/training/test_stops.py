"""Kills, signals and a second process: what a run leaves, and how it goes on."""

from __future__ import annotations

import os
import signal
import time

import pytest
from toy_training import (
    QUIET,
    log,
    recipe,
    same,
    tensors,
    training,
    wait_for_line,
)

from mdiff.errors import CheckpointError
from mdiff.files.atomic import latest, locked, steps, verify
from mdiff.training.loop import train


def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path):
    settings = {"steps": 120, "save_every": 10, "log__every": 1}
    whole = train(recipe(**settings), tmp_path / "whole", **QUIET)
    out = tmp_path / "killed"
    for _ in range(2):
        with training(out, settings) as process:
            wait_for_line(process, "step ")
            time.sleep(0.1)
            process.kill()
            process.communicate()
        found = latest(out)
        if found is not None:
            verify(found)
    resumed = train(recipe(**settings), out, **QUIET)
    assert same(tensors(whole), tensors(resumed))
    assert [record["step"] for record in log(out)] == list(range(1, 121))
    assert [p for p in out.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_step_and_says_so(tmp_path, number):
    settings = {"steps": 10**6, "save_every": 10**6, "log__every": 1, "optim__schedule": "constant"}
    with training(tmp_path / "run", settings) as process:
        wait_for_line(process, "step 2/")
        process.send_signal(number)
        _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "--resume auto goes on" in errors.splitlines()[-1]
    found = latest(tmp_path / "run")
    assert found is not None
    done = steps(tmp_path / "run")[-1]
    assert [record["step"] for record in log(tmp_path / "run")] == list(range(1, done + 1))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_stop_sent_to_a_whole_group_of_processes_saves_the_step_too(tmp_path, number):
    settings = {
        "steps": 10**6, "save_every": 10**6, "log__every": 1, "optim__schedule": "constant",
        "workers": 1, "data__slow": True,
    }  # fmt: skip
    with training(tmp_path / "run", settings) as process:
        wait_for_line(process, "step 2/")
        # It waits for rows now, which the loader still has to bring.
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=200)
    assert "--resume auto goes on" in errors.splitlines()[-1]
    verify(latest(tmp_path / "run"))
    done = steps(tmp_path / "run")[-1]
    assert [record["step"] for record in log(tmp_path / "run")] == list(range(1, done + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_saves_its_step_and_puts_the_handlers_back(tmp_path, number):
    def mine(number, frame):
        raise AssertionError("the run's handler was not asked")

    def stop(line):
        if line.startswith("step 1/"):
            os.kill(os.getpid(), number)

    before = signal.signal(number, mine)
    try:
        with pytest.raises(KeyboardInterrupt, match="--resume auto goes on"):
            train(recipe(log__every=1), tmp_path, report=stop)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)
    verify(latest(tmp_path))
    assert steps(tmp_path)[-1] < 8


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(recipe(), tmp_path, report=lambda line: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps(tmp_path)[-1] == 8


def test_a_second_process_cannot_write_the_same_run(tmp_path):
    with locked(tmp_path):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train(recipe(), tmp_path, **QUIET)
            except CheckpointError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        assert b"is being written by process" in os.read(read, 500)
        os.close(read)
    assert steps(tmp_path) == []
