"""The command line: results, streams, exit codes, and every bad input one line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mdiff.backbones.transformer import transformer
from mdiff.cli import demo, run
from mdiff.cli.options import RENAMED
from mdiff.cli.views.trace import Record, page
from mdiff.modalities.text.modality import text
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

WINDOW = 64
TEMPLATE = "The [MASK:8] of [MASK:3] night"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    modality = text()
    denoiser = transformer(vocab_size=256, width=16, depth=1, heads=2, max_length=WINDOW)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    Pipeline(denoiser.eval(), modality.space, modality, window=WINDOW).save(folder)
    return str(folder)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time, a naïve cat sang. " * 20, encoding="utf-8")
    return path


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


# generate


def test_generate_prints_one_json_object_a_sample(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", model, "--prompt", "hi", "--n", "2", "--length", "12", "--json"]
    assert run(words) == 0
    found = lines(capsys)
    assert len(found) == 2
    keys = {"text", "tokens", "calls", "seconds", "log_prob", "entropy", "seed"}
    for sample in found:
        assert set(sample) == keys
        assert sample["text"].startswith("hi")
        assert (len(sample["tokens"]), sample["calls"]) == (12, 10)
    assert run([*words[:4], "--length", "12", "--seed", str(found[1]["seed"]), "--json"]) == 0
    assert lines(capsys)[0]["tokens"] == found[1]["tokens"]


def test_generate_writes_text_to_stdout_and_figures_to_stderr(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["generate", model, "--infill", TEMPLATE, "--n", "2", "--stream"]) == 0
    captured = capsys.readouterr()
    first, second = captured.out.split("\n---\n")
    assert first.startswith("The ")
    assert second.rstrip("\n").endswith(" night")
    assert captured.err.count("11 calls") == 2
    assert "░" in captured.err
    assert "\x1b" not in captured.err


def test_generate_takes_every_option_of_the_samplers(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        ["--steps", "4", "--sampler", "ancestral", "-o", "schedule=cosine"],
        ["--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--temperature", "0.7"],
        ["--sampler", "any-order", "--order", "right_to_left"],
        ["--sampler", "any_order", "-o", "order=[3, 2, 1, 0, 4, 5]"],
        ["--sampler", "blocks", "--block-length", "3", "-o", "inner=any_order", "--steps", "2"],
        ["--sampler", "confidence", "-o", "score=entropy", "-o", "noise=1.5", "--steps", "3"],
        ["--guidance-scale", "2", "--batch-size", "1", "--dtype", "float64", "--device", "cpu"],
    ):
        assert run(["generate", model, "--prompt", "a", "--length", "6", "--json", *words]) == 0
        assert len(lines(capsys)[0]["tokens"]) == 6


def test_generate_reads_a_file_of_prompts_and_templates(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "ab", "length": 5}, {"infill": "x[MASK:2]y"}, {"prompt": ""}]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(["generate", model, "--input", str(path), "--length", "7", "--json"]) == 0
    assert [len(sample["tokens"]) for sample in lines(capsys)] == [5, 4, 7]


def test_new_tokens_are_counted_after_each_prompt(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", model, "--prompt", "a", "--prompt", "bcd", "--max-new-tokens", "3"]
    assert run([*words, "--json"]) == 0
    assert [len(sample["tokens"]) for sample in lines(capsys)] == [4, 6]


def test_an_old_flag_goes_on_working_and_warns_once(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "generate",
        model,
        "--prompt",
        "ab",
        "--length",
        "6",
        "--guidance-scale",
        "2",
        "--json",
    ]
    assert run([*words, "--json", "--negative-prompt", "xy"]) == 0
    current = capsys.readouterr()
    assert "warning" not in current.err
    assert run([*words, "--json", "--negative", "xy"]) == 0  # alias: --negative
    old = capsys.readouterr()
    assert json.loads(old.out)["tokens"] == json.loads(current.out)["tokens"]
    assert old.err.count("warning: --negative is now --negative-prompt\n") == 1
    # As a value it is a text like any other.
    assert run(["generate", model, "--prompt", "--negative", "--length", "12"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("--negative")
    assert "warning" not in captured.err
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "length": 4}')
    volume = ["generate", model, "--input", str(path), "--out", str(tmp_path / "out")]
    assert run([*volume, "--patience", "60"]) == 0  # alias: --patience
    assert capsys.readouterr().err.startswith("warning: --patience is now")  # alias: --patience


def test_help_shows_the_new_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["generate"], ["edit"], ["tokenizer", "encode"]):
        assert run([*command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert not any(re.search(rf"--{name}\b(?!-)", shown) for name in RENAMED)
    assert "--timeout" in shown


class Fetches(HTMLParser):
    """Collects what a page would load, and its visible words."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "srcset")]


def test_a_trace_is_one_page_that_fetches_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.html"
    assert run(["generate", model, "--infill", TEMPLATE, "--trace", str(path), "--json"]) == 0
    written = path.read_text(encoding="utf-8")
    parser = Fetches()
    parser.feed(written)
    assert parser.found == []
    assert not re.search(r"https?:|url\(|@import|\bfetch\(|XMLHttp", written)
    data = re.search(r'<script id="data"[^>]*>(.*?)</script>', written, flags=re.S)
    assert data is not None
    (record,) = json.loads(data[1])
    assert record["steps"] == 11
    assert sorted(step for step in record["step"] if step) == list(range(1, 12))
    assert "".join(record["pieces"]) == lines(capsys)[0]["text"]


def test_text_on_the_page_never_becomes_markup() -> None:
    evil = "</script><img src=x onerror=alert(1)>&amp;%%DATA%%"
    record = Record("flow", [evil], [1], [-1.0], 1, evil)
    written = page([record], title=evil)
    parser = Fetches()
    parser.feed(written)
    assert "img" not in parser.tags
    assert written.count("</script>") == 2
    data = re.search(r'<script id="data"[^>]*>(.*?)</script>', written, flags=re.S)
    assert data is not None
    assert json.loads(data[1])[0]["pieces"] == [evil]


# eval, inspect, doctor, tokenizer, demo


def shorter(name: str) -> Pipeline:
    """The model, of text with a quarter of its window."""
    pipeline = load(name)
    return replace(pipeline, window=pipeline.window // 4) if name == demo.MODEL else pipeline


def test_eval_reports_bits_by_every_unit_with_errors(
    model: str, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", model, "--data", str(story), "--draws", "4", "--limit", "100"]
    assert run([*words, "--samples", "2", "--json"]) == 0
    (found,) = lines(capsys)
    for unit in ("token", "char", "byte"):
        assert found[f"bits_per_{unit}"] > 0
        assert found[f"bits_per_{unit}_stderr"] > 0
    assert found["chars"] == 100
    assert found["bytes"] == found["tokens"] > 100
    assert (found["estimator"], found["draws"], found["windows"]) == ("any_order", 4, 2)
    assert found["of_samples"]["calls"] == WINDOW
    assert run([*words, "--samples", "0", "--split", "holdout"]) == 0
    assert "bits per char" in capsys.readouterr().out


def test_inspect_accounts_for_every_tensor(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", model, "--json"]) == 0
    (found,) = lines(capsys)
    assert {tensor["used"] for tensor in found["tensors"]} == {"loaded"}
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == 4 * found["parameters"]
    assert found["space"]["mask_id"] == 256
    assert run(["inspect", model]) == 0
    assert "mask 256" in capsys.readouterr().out


def test_doctor_passes_and_a_wrong_sampler_fails_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["doctor", "--json"]) == 0
    (found,) = lines(capsys)
    assert found["passed"]
    assert len(found["checks"]) >= 8
    from mdiff.evaluation import selftest

    # Two tokens from one call are drawn independently, which is another law.
    wrong = (("first_hitting", {"per_call": 2}, True),)
    monkeypatch.setattr(selftest, "SETTINGS", wrong)
    assert run(["doctor"]) == 7
    assert "FAIL first_hitting(per_call=2)" in capsys.readouterr().out


def test_a_tokenizer_is_trained_and_used_from_its_folder(
    story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bpe"
    words = ["tokenizer", "train", str(story), "--out", str(out), "--vocab-size", "280"]
    assert run(words) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert run(["tokenizer", "encode", str(out), "a naïve cat"]) == 0
    ids = capsys.readouterr().out.split()
    assert len(ids) < len("a naïve cat".encode())
    assert run(["tokenizer", "decode", str(out), *ids]) == 0
    assert capsys.readouterr().out == "a naïve cat\n"
    assert run(["tokenizer", "inspect", str(out), "--data", str(story), "--json"]) == 0
    (found,) = lines(capsys)
    assert found["ids"] == 280
    assert found["chars_per_token"] > 1
    assert run(words) == 2


def test_a_model_names_its_tokenizer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "encode", model, "hi", "--json"]) == 0
    assert lines(capsys) == [{"tokens": [104, 105], "pieces": ["h", "i"]}]


@pytest.mark.parametrize(
    "share", [pytest.param(1, id="short"), pytest.param(8, id="whole", marks=pytest.mark.slow)]
)
def test_the_demo_prints_words_and_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: int
) -> None:
    monkeypatch.chdir(tmp_path)
    if share == 1:
        # A quarter of a page of text, and an eighth of the steps for a tenth of the pictures.
        monkeypatch.setattr("mdiff.pipeline.load", shorter)
        changed = {"LEAST_WORDS": 7, "COUNT": 2, "VARIANTS": 1, "OPTIONS": {"steps": 6}}
        for name, value in changed.items():
            monkeypatch.setattr(demo, name, value)
    assert run(["demo"]) == 0
    out = capsys.readouterr().out
    assert len(out.split()) > 10 * share
    assert "What say you," in out
    assert "log-probability" in out
    assert out.splitlines()[-1] == str(tmp_path / "demo.html")
    assert (tmp_path / "demo.html").stat().st_size > 1000


def test_a_demo_by_a_model_without_words_fails_its_gate(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "--model", model]) == 7
    assert "is broken" in capsys.readouterr().err


# Bad input: one line, the exit code, no traceback.


def refused(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(words) == code, words
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert captured.out == ""


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


# Processes


def test_help_and_version_import_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "datasets", "accelerate", "triton", "numpy", "pydantic"]
    script = (
        "import sys; from mdiff.cli import run; code = run(['--help']);"
        f"assert not set({heavy}) & set(sys.modules); sys.exit(code)"
    )
    assert "generate" in processes.python("-c", script, check=True).stdout
    version = processes.python("-c", "from mdiff.cli import main; main()", "--version")
    assert version.stdout.strip() == "0.1.0"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"(sleep 0.2; {sys.executable} -c 'from mdiff.cli import main; main()' --help) | true"
    done = processes.run(["bash", "-o", "pipefail", "-c", command])
    assert done.returncode == 0
    assert done.stderr == ""


def test_a_builtins_bare_name_and_a_misspelt_directory_are_not_looked_for_on_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["inspect", "shakespeare"], 2, "builtin:shakespeare", capsys)
    (tmp_path / "tiny").mkdir()
    refused(["inspect", str(tmp_path / "tinyy")], 4, "no such directory", capsys)


def test_streams_that_are_closed_change_no_exit_code() -> None:
    code = "import sys; sys.stdout = sys.stderr = None; from mdiff.cli import main; main()"
    assert processes.python("-c", code, "train", "/nowhere.yaml", "--out", "x").returncode == 2


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


def test_doctor_reports_a_missing_backend_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MDIFF_BACKEND", "nothing")
    assert run(["doctor"]) == 7
    out = capsys.readouterr().out
    assert "asked for by MDIFF_BACKEND" in out
    assert "FAIL" in out
