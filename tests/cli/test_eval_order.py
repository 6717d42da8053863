"""`mdiff eval --metrics order`: its figures for text and pictures, and wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from picture_commands import saved

from mdiff.cli import run
from mdiff.modalities.image.modality import image


def test_the_spread_of_text_stands_alone_or_beside_the_bound(
    model: str, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", model, "--data", str(story), "--metrics", "order", "--orders", "3"]
    words += ["--window", "8", "--order-rows", "2"]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["order"]["rows"], found["order"]["tokens"]) == (2, 16)
    assert found["order"]["spread"] > 0
    assert "bits_per_token" not in found
    assert run(words) == 0
    assert "3 random orders of each of 2 rows, 16 tokens" in capsys.readouterr().out
    bound = ["--metrics", "order,bound", "--draws", "2", "--samples", "0", "--json"]
    assert run([*words, *bound, "--batch-size", "3"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["order"] == pytest.approx(found["order"], abs=1e-6)
    assert both["bits_per_token"] > 0


def test_by_default_few_short_rows_are_scored(
    model: str, story: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", model, "--data", str(story), "--metrics", "order", "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)["order"]
    assert (found["rows"], found["orders"]) == (8, 8)
    assert found["tokens"] <= 8 * 32
    short = ["--window", "4", "--order-rows", "1", "--orders", "2"]
    assert run(["eval", model, "--data", str(story), "--metrics", "order", *short]) == 0
    line = capsys.readouterr().out
    assert "2 random orders of one row, 4 tokens;" in line
    assert "one row shows no error" in line
    assert "±" not in line


def test_the_spread_of_pictures_is_had_as_the_bound_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = image(
        codec={"name": "levels", "levels": 4, "step": 60}, size=[4, 4], label="condition",
        labels=["ant", "bee"],
    )  # fmt: skip
    model = saved(made, tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 4, (6, 4, 4), dtype=np.uint8) * 60
    np.savez(tmp_path / "x.npz", x=noise, y=np.arange(6) % 2)
    words = ["eval", model, "--data", str(tmp_path / "x.npz"), "--split", "all", "--draws", "2"]
    assert run([*words, "--metrics", "bound,order", "--orders", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["order"]["rows"], found["order"]["tokens"]) == (4, 4 * 16)
    assert found["order"]["spread"] > 0
    assert found["bounds"][0]["of"] == "image"
    assert run([*words, "--metrics", "order", "--order-rows", "0"]) == 0
    assert "8 random orders of each of 6 rows, 96 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--orders", "3"], "--orders needs --metrics order"),
    (["--order-rows", "3"], "--order-rows needs --metrics order"),
    (["--metrics", "order", "--orders", "1"], "--orders 1: need at least 2"),
    (["--metrics", "order", "--order-rows", "-1"], "--order-rows -1: need at least 0"),
    (["--metrics", "order", "--samples", "3"], "--samples needs --metrics bound"),
    (["--metrics", "order", "--draws", "3"], "--draws needs --metrics bound"),
    (["--estimator", "exact", "--draws", "3"], "--draws is for --estimator any_order and time"),
    (["--estimator", "random_order", "--draws", "3"], "--draws is for --estimator any_order"),
    (["--metrics", "ordr"], "did you mean 'order'"),
])  # fmt: skip
def test_bad_options_of_the_metric_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("to be")
    model = ["eval", "builtin:shakespeare", "--data", str(tmp_path / "a.txt")]
    assert run([*model, *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
