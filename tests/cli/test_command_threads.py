"""The threads of the command: how many the process may use, and how they wait."""

from __future__ import annotations

import json
import os

import processes
import pytest
import torch
from torch import nn

from mdiff.cli import threads

PLENTY = {f"/{name}" for name in "abcdefgh"}


@pytest.fixture
def eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: PLENTY, raising=False)


def groups(root, lines, files):
    """A root folder with these lines of /proc/self/cgroup and these files of control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("lines", "files", "count"),
    [
        (["0::/"], {"cpu.max": "max 100000"}, 8),
        (["0::/"], {"cpu.max": "100000 100000"}, 1),
        (["0::/"], {"cpu.max": "350000 100000"}, 3),
        (["0::/"], {"cpu.max": "20000 100000"}, 1),
        (["0::/a/b"], {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        (["0::/a/b"], {"a/b/cpu.max": "200000 100000", "a/cpu.max": "400000 100000"}, 2),
        (["0::/../outside"], {"cpu.max": "200000 100000"}, 2),
        (["0::/gone"], {}, 8),
        (["0::/"], {"cpu.max": "nonsense"}, 8),
        (["0::/"], {"cpu.max": "x y"}, 8),
        (
            ["3:cpu,cpuacct:/a", "2:memory:/m"],
            {"cpu/a/cpu.cfs_quota_us": "150000", "cpu/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            ["3:cpu,cpuacct:/a"],
            {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"},
            8,
        ),
        (
            ["2:memory:/a"],
            {"memory/a/cpu.cfs_quota_us": "1", "memory/a/cpu.cfs_period_us": "1"},
            8,
        ),
        ([], {}, 8),
    ],
)
def test_a_quota_of_any_control_group_bounds_the_cpus(tmp_path, eight_cpus, lines, files, count):
    assert threads.usable_cpus(groups(tmp_path, lines, files)) == count


def test_without_control_groups_the_affinity_counts(tmp_path, eight_cpus):
    assert threads.usable_cpus(tmp_path) == 8


@pytest.mark.parametrize("chosen", threads.WAITING)
def test_how_threads_wait_is_the_users_choice_first(chosen):
    environ = {chosen: "1"}
    threads.prepare(environ)
    assert environ == {chosen: "1"}


def test_the_command_sets_a_passive_wait_and_a_count_where_a_quota_is_smaller(monkeypatch):
    environ = {}
    threads.prepare(environ)
    assert environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setattr(threads, "usable_cpus", lambda: 1)
    monkeypatch.setattr(threads, "_affinity", lambda: 8)
    threads.prepare(environ)
    assert environ["OMP_NUM_THREADS"] == "1"
    environ = {"MKL_NUM_THREADS": "5"}
    threads.prepare(environ)
    assert environ == {"MKL_NUM_THREADS": "5", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("size", "chosen", "count"), [(1, False, 1), (4_000_001, False, 2), (1, True, 6)]
)
def test_a_small_model_gets_few_threads_unless_the_user_chose(monkeypatch, size, chosen, count):
    asked = []
    monkeypatch.setattr(threads, "_counts_here", not chosen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with torch.device("meta"):
        model = nn.Linear(size, 1, bias=False)
    threads.fit_threads(model)
    assert (asked or [6]) == [count]


def test_only_the_command_changes_the_environment():
    """Importing the library and its command line leaves OpenMP's variables alone."""
    code = (
        "import json, os; before = dict(os.environ); import mdiff, mdiff.cli\n"
        "same = dict(os.environ) == before\n"
        "try: mdiff.cli.main(['--version'])\n"
        "except SystemExit: print(json.dumps([same, os.environ.get('OMP_WAIT_POLICY')]))"
    )
    environ = {name: value for name, value in os.environ.items() if name not in threads.WAITING}
    found = processes.python("-c", code, env=environ, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == [True, "PASSIVE"]
