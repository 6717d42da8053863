"""Every command as a process whose stdout or stderr fails: exit codes, and files that are whole."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE

import processes
import pytest
from command_lines import COMMANDS, STREAMS, left_by, models
from figures import record

# What fails, and how often each command runs with it.
FAILING = [(kind, where) for kind in STREAMS for where in ((1,), (2,))] + [("gone", (1, 2))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    models(made)
    return made


def run(words: list[str], cwd: Path, kind: str, where: tuple[int, ...]) -> tuple[int, bytes, bytes]:
    """The exit code of `mdiff`, and what its streams show, where they can."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if kind == "ascii":
        environment["PYTHONIOENCODING"] = "ascii"
    opened = {1: PIPE, 2: PIPE}
    handles = []
    for number in where:
        if kind == "gone":
            read, write = os.pipe()
            os.close(read)
            handles.append(write)
            opened[number] = write
        elif kind == "full":
            handles.append(os.open("/dev/full", os.O_WRONLY))
            opened[number] = handles[-1]

    def close() -> None:
        for number in where if kind == "closed" else ():
            os.close(number)

    done = processes.python(
        "-m", "mdiff", *words, cwd=cwd, env=environment, preexec_fn=close, stdin=DEVNULL,
        stdout=opened[1], stderr=opened[2], timeout=500, text=False,
    )  # fmt: skip
    for handle in handles:
        os.close(handle)
    return done.returncode, done.stdout or b"", done.stderr or b""


@pytest.mark.faults
def test_every_command_finishes_its_files_whatever_becomes_of_its_streams(
    folder: Path, tmp_path: Path
) -> None:
    cases = [(name, *failing) for name in COMMANDS for failing in FAILING]
    assert len(cases) <= 200

    def tried(number: int) -> str:
        name, kind, where = cases[number]
        here = tmp_path / str(number)
        here.mkdir()
        for path in folder.iterdir():
            (here / path.name).symlink_to(path)
        case = f"{name} with {kind} {where}"
        code, out, err = run(COMMANDS[name].words, here, kind, where)
        wanted = 6 if kind == "full" and 1 in where else 0
        if code != wanted:
            return f"{case}: exit code {code}, not {wanted}: {err.decode(errors='replace')[-300:]}"
        if b"Traceback" in err or b"Exception ignored" in err:
            return f"{case}: {err.decode(errors='replace')[-300:]}"
        if kind == "ascii" and not (out + err).isascii():
            return f"{case}: not ASCII"
        if 1 not in where and not out:
            return f"{case}: nothing on stdout"
        try:
            left_by(COMMANDS[name], here)
        except Exception as error:
            return f"{case}: {type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(2) as pool:
        wrong = [line for line in pool.map(tried, range(len(cases))) if line]
    record("stream matrix", {"processes": len(cases), "wrong": len(wrong)})
    assert not wrong, "\n".join(wrong)
