"""The commands but `generate`: results, streams, and what starts them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from text_commands import WINDOW, lines

from mdiff.cli import demo, run
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline


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


def test_streams_that_are_closed_change_no_exit_code() -> None:
    code = "import sys; sys.stdout = sys.stderr = None; from mdiff.cli import main; main()"
    assert processes.python("-c", code, "train", "/nowhere.yaml", "--out", "x").returncode == 2


def test_doctor_reports_a_missing_backend_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MDIFF_BACKEND", "nothing")
    assert run(["doctor"]) == 7
    out = capsys.readouterr().out
    assert "asked for by MDIFF_BACKEND" in out
    assert "FAIL" in out
