"""Generation at volume as processes of the command line."""

from __future__ import annotations

import os
import signal
import sys
import time

import processes
import psutil
import pytest
from folders import ACCELERATE, ROOT
from volume_runs import (
    content,
    written,
)  # fmt: skip


def volume(model, requests, out):
    return [
        "mdiff", "generate", model, "--input", requests, "--out", out, "--seed", "3",
        "--batch-size", "3", "--length", "40",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_command_that_is_ended_leaves_no_process(model, tmp_path, number, code, whole_group):
    rows = [{"id": i, "prompt": "", "length": 40} for i in range(600)]
    requests = written(tmp_path / "in.jsonl", rows)
    words = [sys.executable, "-m", *volume(model, requests, tmp_path / "out"), "--workers", "2"]
    with processes.running(words, cwd=ROOT) as process:
        while not list((tmp_path / "out" / "shards").glob("shard-*")):
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        (os.killpg if whole_group else os.kill)(process.pid, number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == code, err
        assert psutil.wait_procs(family, timeout=30)[1] == []
    if number == signal.SIGINT:
        assert "shards are complete; the same command goes on" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_bytes(model, requests, tmp_path):
    processes.python("-m", *volume(model, requests, tmp_path / "one"), cwd=ROOT, check=True)
    launcher = processes.launcher(ACCELERATE / "cpu.yaml", "-m")
    words = [*launcher, *volume(model, requests, tmp_path / "two")]
    processes.run(words, cwd=ROOT, check=True)
    assert (tmp_path / "two" / ".lock-2-of-2").exists()
    assert content(tmp_path / "two") == content(tmp_path / "one")
