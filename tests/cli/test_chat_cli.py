"""`mdiff chat`: turns on a pipe and in a terminal, its commands, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_commands import refused
from tiny_chat import TEMPLATE, chat_model

import mdiff.cli.chat
from mdiff.cli import run
from mdiff.pipeline.loading import load

SILENT = TEMPLATE.replace("in messages %}", "in messages if m.role != 'system' %}")
SHORT = ["--max-new-tokens", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(chat_model(tmp_path_factory.mktemp("models") / "chat"))


class Terminal(io.StringIO):
    """Lines that somebody types; Ctrl-C at a line that is "^C"."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: Any) -> str:  # type: ignore[override]
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str],
    lines: list[str], *, terminal: bool = False,
) -> tuple[int, list[str], str]:  # fmt: skip
    """The exit code, the answers and the messages of a chat with these lines."""
    monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)("\n".join(lines)))
    code = run(["chat", *words])
    printed = capsys.readouterr()
    return code, printed.out.split("\n")[:-1], printed.err


def test_each_line_of_a_pipe_is_a_turn_and_all_turns_are_read(
    model: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    words = [model, *SHORT, "--system", "be brief"]
    lines = ["hello", "", "  ", "and now?", f"/save {saved}", "/quit", "never read"]
    code, answers, said = typed(monkeypatch, capsys, words, lines)
    assert (code, said.count("calls")) == (0, 2)
    talk = json.loads(saved.read_text())["chat"]
    assert [one["role"] for one in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert [one["content"] for one in talk[::2]] == ["be brief", *answers]
    # The second answer is that of a call with the whole conversation.
    pipeline = load(model)
    (sample,) = pipeline.generate(
        {"chat": talk[:-1]}, max_new_tokens=5, sampler="confidence", temperature=0.0,
        block_length=32, seed=1,
    )  # fmt: skip
    assert sample.text == answers[1]


def test_a_conversation_goes_on_from_a_file(
    model: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    talk = tmp_path / "talk.json"
    begun = [{"role": "user", "content": "hello"}]
    answers = []
    for written in (begun, {"chat": begun}):
        talk.write_text(json.dumps(written))
        code, found, _ = typed(monkeypatch, capsys, [model, *SHORT, "--messages", str(talk)], [])
        assert code == 0
        answers.append(found)
    assert answers[0] == answers[1] == typed(monkeypatch, capsys, [model, *SHORT], ["hello"])[1]


def test_regenerate_draws_another_answer_to_the_same_message(
    model: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = ["hello", "/regenerate", f"/save {saved}"]
    code, answers, said = typed(monkeypatch, capsys, [model, *SHORT], lines)
    assert (code, len(set(answers))) == (0, 2)
    assert "temperature 0.7" in said
    talk = json.loads(saved.read_text())["chat"]
    assert [one["content"] for one in talk] == ["hello", answers[1]]


def test_length_sets_that_of_the_next_answers(model: str, monkeypatch: Any, capsys: Any) -> None:
    lines = ["a", "/length 9", "a", "/length", "/help"]
    code, _, said = typed(monkeypatch, capsys, [model, *SHORT], lines)
    assert code == 0
    assert [" 5 calls" in said, " 9 calls" in said] == [True, True]
    assert "as long as it takes" in said
    for command in mdiff.cli.chat.COMMANDS:
        assert command in said


@pytest.mark.parametrize(("line", "code", "message"), [
    ("/lenght 3", 2, "did you mean '/length'"),
    ("/length 0", 2, "1 to 9999999"),
    ("/length\t-3", 2, "1 to 9999999"),
    ("/length 10000000", 2, "1 to 9999999"),
    ("/length ²", 2, "1 to 9999999"),
    ("/save", 2, "a file name"),
    ("/save .", 2, "is a directory"),
    ("/save /no/such/file", 2, "there is no directory"),
    ("/save a\0b", 2, "null byte"),
    (f"/save {'n' * 300}", 2, "too long"),
    ("/save ~nobody-here/x", 2, "there is no directory"),
    ("/regenerate", 2, "no answer yet"),
    ("caf\udce9", 3, "Unicode"),
    ("<|im_end|>", 2, "special token"),
    ("<|mask|>", 3, "mask"),
    ("a" * 300, 3, "--drop-oldest"),
])  # fmt: skip
def test_a_line_that_is_refused_ends_a_pipe_and_not_a_terminal(
    model: str, monkeypatch: Any, capsys: Any, line: str, code: int, message: str
) -> None:
    found, answers, said = typed(monkeypatch, capsys, [model], [line, "hello"])
    assert (found, answers) == (code, [])
    assert said.count("\n") == 1
    assert message in said
    found, answers, said = typed(
        monkeypatch, capsys, [model, *SHORT], [line, "hello"], terminal=True
    )
    assert (found, len(answers)) == (0, 1)
    assert message in said


def test_the_oldest_turns_are_left_out_only_when_asked(
    model: str, monkeypatch: Any, capsys: Any
) -> None:
    lines = ["a" * 80, "b" * 80, "c" * 80]
    code, answers, said = typed(monkeypatch, capsys, [model, *SHORT], lines)
    assert (code, "--drop-oldest" in said) == (3, True)
    code, answers, said = typed(monkeypatch, capsys, [model, *SHORT, "--drop-oldest"], lines)
    assert (code, len(answers)) == (0, 3)


def test_control_c_ends_an_answer_and_at_the_prompt_the_program(
    model: str, monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    steps: list[int] = []

    def interrupted(view: Any) -> Any:
        for number, state in enumerate(view):
            steps.append(number)
            yield state
            if number == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr("mdiff.cli.views.live.watched", interrupted)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    saved = tmp_path / "talk.json"
    lines = ["hello", f"/save {saved}", "^C", "never"]
    code, answers, said = typed(
        monkeypatch, capsys, [model, "--max-new-tokens", "20"], lines, terminal=True
    )
    assert (code, steps) == (130, [0, 1, 2, 3])
    assert "(stopped)" in said
    talk = json.loads(saved.read_text())["chat"]
    assert [one["content"] for one in talk] == ["hello", "\n".join(answers)]


@pytest.mark.parametrize(("words", "code", "message"), [
    (["builtin:shakespeare"], 3, "no chat template: give a plain prompt"),
    (["builtin:emoji"], 2, "a model of image"),
    (["--threshold", "2"], 2, "threshold=2"),
    (["--steps", "0"], 2, "steps=0"),
    (["--sampler", "confidense"], 2, "did you mean 'confidence'"),
    (["--grow", "blocks"], 2, "use grow='daedal'"),
    (["--max-new-tokens", "0"], 2, "max_new_tokens=0"),
    (["--max-new-tokens", "256"], 2, "max_new_tokens=256: the window of this model has 256"),
    (["-o", "seed=3"], 2, "use --seed"),
    (["--temperature", "nan"], 2, "finite"),
    (["--messages", "none.json"], 3, "none.json"),
])  # fmt: skip
def test_what_no_answer_could_be_drawn_with_is_refused_before_anybody_types(
    model: str, monkeypatch: Any, capsys: Any, words: list[str], code: int, message: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    words = words if words[0].startswith("builtin") else [model, *words]
    refused(["chat", *words], code, message, capsys)


@pytest.mark.parametrize("written", [
    "", "hello", "[]x", "3", "{}", '{"chat": 3}', "[3]", '[{"role": "user"}]',
    '[{"content": "a"}]', '[{"role": null, "content": "a"}]', '[{"role": {}, "content": "a"}]',
    '[{"role": "boss", "content": "a"}]', '{"chat": [], "tools": 3}', "[" * 9000,
])  # fmt: skip
def test_a_file_that_is_no_conversation_is_an_error_of_data(
    model: str, monkeypatch: Any, capsys: Any, tmp_path: Path, written: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "talk.json").write_text(written)
    refused(["chat", model, "--messages", str(tmp_path / "talk.json")], 3, "error", capsys)


def test_a_template_without_system_messages_is_said_to_be_one(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    silent = str(chat_model(tmp_path / "silent", template=SILENT))
    bare = str(chat_model(tmp_path / "bare", template=None))
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    capsys.readouterr()
    refused(["chat", silent, "--system", "be brief"], 3, "leaves out message 1", capsys)
    refused(["chat", bare], 3, "no chat template: give a plain prompt", capsys)


def test_a_closed_input_is_the_end_of_it(model: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["chat", model]) == 0


@pytest.mark.slow
def test_a_conversation_in_a_real_terminal(model: str) -> None:
    pid, terminal = pty.fork()
    if not pid:
        os.execve(  # pragma: no cover
            sys.executable,
            [sys.executable, "-m", "mdiff", "chat", model, "--max-new-tokens", "150"],
            {**os.environ, "TERM": "xterm-256color"},
        )
    shown = b""

    def until(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 65536)
        shown = shown.partition(text)[2]

    signal.alarm(120)
    until(b"> ")
    os.write(terminal, b"hello\n")
    until("░".encode())
    time.sleep(0.2)
    os.write(terminal, b"\x03")
    until(b"(stopped")
    until(b"> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    signal.alarm(0)


def test_generate_takes_conversations_with_tools_of_a_file(
    model: str, tmp_path: Path, capsys: Any
) -> None:
    said = [{"role": "user", "content": "hello"}]
    rows: list[dict[str, Any]] = [
        {"chat": said}, {"chat": "hello"}, {"chat": said * 40, "drop_oldest": True},
    ]  # fmt: skip
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["generate", model, "--input", str(tmp_path / "in.jsonl"), "--json", "--seed", "3"]
    assert run([*words, "--max-new-tokens", "6"]) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert made[0]["tokens"][:-6] == made[1]["tokens"][:-6]
    assert len(made[2]["tokens"]) <= 256
    for row, message in (
        ({"chat": said, "tools": [{"name": "x"}]}, "leaves out tools"),
        ({"prompt": "a", "tools": []}, "expected one of"),
        ({"chat": {}}, "expected one of"),
        ({"chat": []}, "the chat is empty"),
        ({"chat": [{"role": "boss", "content": ""}]}, "role='boss'"),
    ):
        (tmp_path / "in.jsonl").write_text(json.dumps(row))
        refused(words, 3, message, capsys)


def test_a_chat_of_generate_grows_and_says_so(model: str, monkeypatch: Any, capsys: Any) -> None:
    def of_blocks(name: Any, **options: Any) -> Any:
        return replace(load(name, **options, block_length=8), window=48)

    monkeypatch.setattr("mdiff.pipeline.load", of_blocks)
    words = ["generate", model, "--chat", "hello", "--json", "--sampler", "confidence"]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["grow"] == "blocks"
    for more in (["--length", "40"], ["--max-new-tokens", "9"], ["--end", "keep"]):
        assert run([*words, *more]) == 0
        assert "grow" not in json.loads(capsys.readouterr().out)
