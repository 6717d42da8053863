"""Standard streams that fail: nothing but what they should show is lost."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
from command_lines import COMMANDS, STREAMS, Command, left_by, models, stream

import mdiff.cli as cli
from mdiff.cli.views.streams import Output, Printed

# A core of the matrix, in this process; tests/faults/test_streams.py has the whole.
CORE = ("generate", "generate input", "train", "eval", "tokenizer train", "tokenizer encode")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    models(made)
    return made


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and data of the commands, which is the current one."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ended(command: Command, here: Path, *, out: str, err: str) -> tuple[int, str]:
    """The exit code of a command whose streams are of these kinds, and what stdout shows."""
    shown = here / "shown"
    shown.mkdir(exist_ok=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        stream(out, shown) as stdout,
        stream(err, here) as stderr,
    ):
        for name, value in (("stdout", stdout), ("stderr", stderr)):
            patch.setattr(sys, name, value)
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(cli, "prepare", lambda: None)
        with pytest.raises(SystemExit) as end:
            cli.main(command.words)
    printed = shown / "printed"
    code = end.value.code
    assert isinstance(code, int)
    return code, printed.read_text("ascii") if printed.exists() else ""


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", CORE)
def test_work_is_finished_whatever_becomes_of_its_streams(name: str, kind: str, here: Path) -> None:
    command = COMMANDS[name]
    code, shown = ended(command, here, out=kind, err=kind)
    assert code == (6 if kind == "full" else 0)
    left_by(command, here)
    assert bool(shown) == (kind == "ascii")


def test_messages_that_nobody_reads_change_no_exit_code(here: Path) -> None:
    for kind in STREAMS:
        code, shown = ended(COMMANDS["eval"], here, out="ascii", err=kind)
        assert code == 0
        assert " +- " in shown
        assert ended(Command(["inspect", "nowhere/at/all"]), here, out="ascii", err=kind)[0] == 4


def test_json_is_ascii_where_the_stream_is(here: Path) -> None:
    _, shown = ended(COMMANDS["tokenizer encode"], here, out="ascii", err="ascii")
    assert json.loads(shown)["tokens"] == list("naïve 漢字".encode())


def test_text_is_escaped_where_the_stream_lacks_its_characters(here: Path) -> None:
    _, shown = ended(COMMANDS["tokenizer decode"], here, out="ascii", err="ascii")
    assert shown == "\\xe9\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "backslashreplace"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(
    encoding: str, errors: str, tmp_path: Path
) -> None:
    every = "".join(map(chr, (*range(1, 0x3000), *range(0xD7F0, 0xE010), 0x1F600, 0x10FFFF)))
    with (tmp_path / "out").open("w", encoding=encoding, errors=errors, newline="\n") as file:
        printed = Printed(file)
        printed.write(every)
        printed.flush()
    written = (tmp_path / "out").read_bytes()
    assert len(written) >= len(every)
    written.decode(encoding)


def test_the_choice_of_errors_by_the_user_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii", errors="replace") as file:
        printed = Printed(file)
        printed.write("é±")
        printed.flush()
    assert (tmp_path / "out").read_text() == "??"


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    size = 10**6
    found: list[int] = []

    def drain() -> None:
        while len(data := os.read(read, 65536)):
            found.append(len(data))

    reader = threading.Thread(target=drain)
    with os.fdopen(write, "w") as file:
        printed: Any = Printed(file)
        timer = threading.Timer(0.1, reader.start)
        timer.start()
        printed.write("x" * size)
        printed.flush()
        assert printed.output.fault is None
    timer.join()
    reader.join()
    os.close(read)
    assert sum(found) == size


def test_what_follows_an_error_is_discarded_without_another_call() -> None:
    with open("/dev/full", "wb") as file:
        output = Output(file.fileno(), "wb", closefd=False)
        assert output.write(b"abc") == 3
        fault = output.fault
        assert isinstance(fault, OSError)
        assert output.write(memoryview(b"de")) == 2
        assert output.fault is fault


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "unknown", "NO_COLOR": "1"}, False),
        ({"TERM": "xterm", "COLUMNS": "x", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "TTY_COMPATIBLE": "0"}, False),
    ],
)
def test_a_stream_of_the_canvas_is_shown_on_every_terminal(
    given: dict[str, str], drawn: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.run(["generate", "text", "--length", "12", "--stream"]) == 0
    shown = sys.stderr.getvalue()
    assert ("\x1b[" in shown) == drawn
    # Snapshots are numbered lines.
    assert ("[12/12]" in shown) != drawn
