"""No process that a test starts outlives its test, nor the pytest that ran it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from folders import SUPPORT, TESTS

# A child whose own child is in another session and ignores what it may; it writes its process id.
PARENT = """
import subprocess, sys, time
child = "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN); " \\
    "open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child, sys.argv[1]], start_new_session=True)
while sys.argv[2] == "stay" or not open(sys.argv[1], "a+").seek(0, 2):
    time.sleep(0.01)
"""
PYTEST = """
import sys
sys.path.insert(0, sys.argv[1])
import processes
processes.watched()
with processes.running([sys.executable, "-c", *sys.argv[2:]]) as process:
    process.wait()
"""


def written(path):
    """The process id in a file, as soon as it is there."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and path.read_text().endswith(" "):
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"{path}: no process id")


def runs(process):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{process}/environ", "rb") as file:
            return file.read() != b""
    except OSError:
        return False


@pytest.mark.parametrize("parent", ["stay", "leave"])
def test_a_descendant_ends_with_the_block_that_started_its_parent(tmp_path, parent):
    with processes.running([sys.executable, "-c", PARENT, tmp_path / "pid", parent]) as process:
        descendant = written(tmp_path / "pid")
        assert runs(descendant)
        if parent == "leave":
            assert process.wait(30) == 0
    assert not runs(descendant)
    assert process.returncode == (0 if parent == "leave" else -9)


def test_a_descendant_ends_with_the_time_of_its_parent(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        processes.python("-c", PARENT, tmp_path / "pid", "stay", timeout=1)
    assert not runs(written(tmp_path / "pid"))


def test_all_descendants_end_with_a_pytest_that_is_killed(tmp_path):
    # Not by the helper, which would end them itself.
    words = [sys.executable, "-c", PYTEST, SUPPORT, PARENT, tmp_path / "pid", "stay"]
    ran = subprocess.Popen(words)
    descendant = written(tmp_path / "pid")
    ran.kill()
    ran.wait()
    end = time.monotonic() + 20
    while runs(descendant) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs(descendant)


def test_this_pytest_is_watched_too():
    assert f"{os.getpid()}-" in os.environ[processes.MARK]


def test_tests_start_processes_by_the_one_helper():
    starts = {"run", "Popen", "call", "check_call", "check_output", "system", "popen"}
    for path in sorted({*TESTS.rglob("*.py")} - {Path(processes.__file__), Path(__file__)}):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if re.search(r"\b(subprocess|os)\.", text) else ():
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                started = node.value.id in ("subprocess", "os") and node.attr in starts
                assert not started, f"{path}:{node.lineno}: by tests/support/processes.py"
