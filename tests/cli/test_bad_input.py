"""Bad input of the command line: one line, the exit code, no traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_commands import refused

from mdiff.cli import run


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--length", "0"], 2, "length=0: need at least 1"),
        (["--num-samples", "0"], 2, "num_samples=0: need at least 1"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens=0: need at least 1"),
        (["--length", "9", "--max-new-tokens", "3"], 2, "give one of them"),
        (["--batch-size", "0"], 2, "batch_size=0"),
        (["--lenght", "4"], 2, "did you mean '--length'"),
        (["--seed", "x"], 2, "--seed"),
        (["--seed", str(2**70)], 2, "64-bit"),
        (["--sampler", "anestral"], 2, "did you mean 'ancestral'"),
        (["--steps", "3"], 2, "first_hitting does not take 'steps'"),
        (["--steps", "0", "--sampler", "ancestral"], 2, "steps=0"),
        (["--temperature", "-1"], 2, "temperature=-1"),
        (["--temperature", "nan"], 2, "temperature=nan"),
        (["--top-p", "1.5"], 2, "top_p=1.5"),
        (["--top-k", "0"], 2, "top_k=0"),
        (["--order", "up", "--sampler", "any_order"], 2, "unknown order 'up'"),
        (["-o", "order=[0, 0, 1]", "--sampler", "any_order", "--length", "3"], 2, "permutation"),
        (["-o", "per_cal=2"], 2, "did you mean 'per_call'"),
        (["-o", "per_call=x"], 2, "expected int"),
        (["-o", "nonsense"], 2, "expected name=value"),
        (["-o", "per_call=[1"], 2, "per_call"),
        (["--guidance-scale", "inf"], 2, "finite"),
        (["--prompt", "a", "--infill", "[MASK]"], 2, "give one of them"),
        (["--prompt", "a [MASK] b"], 3, "use infill"),
        (["--prompt", "hello", "--length", "3"], 3, "do not fit a canvas of 3"),
        (["--infill", "no gap"], 3, "nothing to fill in"),
        (["--infill", "[MASK:0]"], 2, "expected 1 to"),
        (["--length", "999"], 2, "use sampler 'blocks'"),
        (["--trace", "/no/where/x.html"], 2, "no directory"),
        (["--input", "/no/where.jsonl"], 3, "no such file"),
        (["--dtype", "int3"], 2, "unknown dtype"),
    ],
)
def test_bad_options_of_generate_are_one_line(
    model: str, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["generate", model, *words], code, message, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n\n", "holds no object"),
        (b'{"prompt": 3}', "a string"),
        (b'{"promt": "a"}', "did you mean 'prompt'"),
        (b'{"prompt": "a", "infill": "b"}', "one of"),
        (b'{"prompt": "a", "length": 0}', "length=0"),
        (b'{"prompt": "a"', "line 1"),
        (b'{"prompt": "\xff"}', "offset 12"),
    ],
)
def test_a_bad_input_file_is_one_line(
    model: str, tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    refused(["generate", model, "--input", str(path)], 3, message, capsys)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "needs a command"),
        (["generte"], 2, "did you mean 'generate'"),
        (["generate"], 2, "missing argument"),
        (["generate", "/no/where"], 4, "no such directory"),
        (["generate", "builtin:nothing"], 2, "no builtin model"),
        (["inspect", "/"], 4, "holds no model"),
        (["tokenizer"], 2, "needs a command"),
        (["tokenizer", "encode", "bpe", "x"], 2, "trained first"),
        (["tokenizer", "decode", "byte", "300"], 3, "id 300"),
        (["tokenizer", "decode", "byte", "x"], 3, "expected ids"),
        (["tokenizer", "train", "/no/where.txt", "--out", "new"], 3, "no such file"),
        (["tokenizer", "train", "a.txt", "--out", "new", "--kind", "bpee"], 2, "'bpe'"),
        (["demo", "--out", "/no/where.html"], 2, "no directory"),
        (["train", "/no/recipe.yaml", "--out", "x"], 2, "recipe"),
    ],
)
def test_bad_commands_are_one_line(
    words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    refused(words, code, message, capsys)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--data", "/no/where.txt"], 3, "no such file"),
        (["--data", "STORY", "--limit", "-1"], 2, "--limit -1"),
        (["--data", "STORY", "--draws", "1"], 2, "--draws 1"),
        (["--data", "STORY", "--window", "0"], 2, "--window 0"),
        (["--data", "STORY", "--split", "trian"], 2, "did you mean 'train'"),
        (["--data", "STORY", "--holdout", "1"], 2, "holdout=1"),
        (["--data", "STORY", "--estimator", "any"], 2, "estimator='any'"),
        ([], 2, "missing option"),
    ],
)
def test_bad_options_of_eval_are_one_line(
    model: str, story: Path, words: list[str], code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [str(story) if word == "STORY" else word for word in words]
    refused(["eval", model, *words], code, message, capsys)


def failing(error: BaseException) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 6, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), 6, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, "out of memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 6, "disk is full"),
        (ZeroDivisionError("a\nb"), 1, "ZeroDivisionError: a b"),
    ],
)
def test_every_failure_has_its_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("mdiff.pipeline.load", failing(error))
    refused(["generate", "anything"], code, message, capsys)


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mdiff.pipeline.load", failing(ZeroDivisionError("x")))
    with pytest.raises(ZeroDivisionError):
        run(["generate", "anything", "--debug"])


OPTIONS = (
    "--prompt", "--infill", "--n", "--length", "--sampler", "--steps", "--temperature", "--top-k",
    "--top-p", "--min-p", "--block-length", "--order", "--seed", "--batch-size", "-o",
    "--guidance-scale", "--json", "--stream", "--input", "--lengthy", "--",
)  # fmt: skip


VALUES = st.one_of(
    st.sampled_from(("1", "0", "-1", "3", "7", "0.5", "nan", "1e99", "[MASK:2]", "a", "", "é")),
    st.sampled_from(("ancestral", "blocks", "confidence", "any_order", "random", "steps=2")),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6),
)


@given(st.lists(st.tuples(st.sampled_from(OPTIONS), VALUES), max_size=4))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_command_line_ends_with_an_exit_code_and_at_most_a_line(
    model: str, capsys: pytest.CaptureFixture[str], pairs: list[tuple[str, str]]
) -> None:
    words = [word for pair in pairs for word in pair]
    code = run(["generate", model, "--length", "5", *words])
    captured = capsys.readouterr()
    assert code in (0, 2, 3), (words, captured.err)
    if code:
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in captured.err


def test_a_builtins_bare_name_and_a_misspelt_directory_are_not_looked_for_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["inspect", "shakespeare"], 2, "builtin:shakespeare", capsys)
    (tmp_path / "tiny").mkdir()
    refused(["inspect", str(tmp_path / "tinyy")], 4, "no such directory", capsys)


def test_text_that_is_not_unicode_is_refused(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["generate", model, "--prompt", "a\udcff"], 3, "Unicode", capsys)


@pytest.mark.parametrize("option", ["counts=[[[1]]]", "inner=[1]", "schedule=[1]"])
def test_sampler_options_of_the_wrong_kind_are_refused(
    option: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = "blocks" if option.startswith("inner") else "confidence"
    words = ["generate", model, "--length", "8", "--sampler", sampler, "-o", option]
    assert run(words) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_function_that_is_no_sampler_is_refused(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["generate", model, "--sampler", "os:system"], 2, "not a sampler", capsys)
