"""`mdiff generate` of text: results, streams, requests and traces."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from text_commands import lines

from mdiff.cli import run
from mdiff.cli.generate import Drawing
from mdiff.cli.options import RENAMED
from mdiff.cli.views.trace import Record, page
from mdiff.errors import ConfigError

TEMPLATE = "The [MASK:8] of [MASK:3] night"


def test_generate_prints_one_json_object_a_sample(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", model, "--prompt", "hi", "--n", "2", "--length", "12", "--json"]
    assert run(words) == 0
    found = lines(capsys)
    assert len(found) == 2
    keys = {"text", "tokens", "calls", "seconds", "log_prob", "entropy", "seed", "writing"}
    for sample in found:
        assert set(sample) == keys | {"log_prob_is_exact"}
        assert sample["log_prob_is_exact"] is True
        assert sample["text"].startswith("hi")
        assert (len(sample["tokens"]), sample["calls"]) == (12, 10)
    assert run([*words[:4], "--length", "12", "--seed", str(found[1]["seed"]), "--json"]) == 0
    assert lines(capsys)[0]["tokens"] == found[1]["tokens"]
    for options in (["--temperature", "0.5"], ["--sampler", "gibbs"], ["--sampler", "confidence"]):
        assert run([*words, *options]) == 0
        assert not any(sample["log_prob_is_exact"] for sample in lines(capsys))
        assert run([*words[:-1], *options]) == 0
        assert "log-probability of all draws" in capsys.readouterr().err


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
    (row,) = lines(capsys)
    assert "".join(record["pieces"]) == row["text"]
    writing = row["writing"]
    assert writing["step"] == record["step"]
    assert sum(writing["log_prob"]) == pytest.approx(row["log_prob"], abs=1e-4)
    assert writing["times"] == [int(step > 0) for step in record["step"]]
    assert all(0 <= margin <= 1 for margin in writing["margin"])


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


def test_no_option_of_drawing_is_given_by_its_flag_and_by_o() -> None:
    names = set(vars(Drawing())) - {"option"}
    assert len(names) > 15
    for name in names:
        given = {name: "0.1,0.9", "option": [f"{name}=[0.1, 0.9]"]}
        with pytest.raises(ConfigError, match=f"option {name}: (given by its flag too|no option)"):
            Drawing(**given).options()
