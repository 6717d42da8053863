"""Where a run that is evaluated is cut: as it was trained, or a line says that it is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from toy_training import QUIET

from mdiff.cli import run
from mdiff.cli.cut import Cut, cut_of
from mdiff.errors import CheckpointError
from mdiff.training.loop import train
from mdiff.training.recipe import parse_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of one step on 60 pictures, of which it held out a fiftieth; and these pictures."""
    folder = tmp_path_factory.mktemp("trained")
    x = np.random.default_rng(0).integers(0, 4, (60, 8, 8), dtype=np.uint8)
    np.savez(folder / "data.npz", x=x, y=np.arange(60) % 3)
    np.savez(folder / "other.npz", x=x[::-1], y=np.arange(60) % 3)
    train(parse_recipe({
        "data": {"source": str(folder / "data.npz"), "holdout": 0.02},
        "modality": {"name": "image", "codec": {"name": "levels", "levels": 4, "step": 1},
                     "size": [8, 8], "label": "condition"},
        "model": {"name": "transformer", "width": 8, "depth": 1, "heads": 1},
        "train": {"steps": 1, "batch_size": 4},
    }), folder / "run", **QUIET)  # fmt: skip
    return folder


def evaluated(trained, capsys, *words, data="data.npz"):
    assert run(["eval", str(trained / "run"), "--data", str(trained / data), "--draws", "2",
                "--json", *words]) == 0  # fmt: skip
    out, err = capsys.readouterr()
    return json.loads(out)["pictures"], err


def test_a_run_is_evaluated_on_what_it_held_out_itself(trained, capsys):
    count, said = evaluated(trained, capsys)
    assert count == 2
    assert "trained" not in said


@pytest.mark.parametrize("words", [["--holdout", "0.1"], ["--validation", "0.2"]])
def test_another_cut_than_the_runs_is_said(trained, capsys, words):
    said = evaluated(trained, capsys, *words)[1]
    assert "the run was trained with holdout 0.02, validation 0.0, this is" in said


def test_the_same_cut_by_flags_is_no_other(trained, capsys):
    assert "trained" not in evaluated(trained, capsys, "--holdout", "0.02")[1]


def test_data_in_another_order_or_of_others_is_said(trained, capsys):
    assert "not what the run was trained on" in evaluated(trained, capsys, data="other.npz")[1]
    assert "trained on" not in evaluated(trained, capsys, "--split", "all", data="other.npz")[1]


def test_a_run_that_has_not_recorded_its_data_is_said(trained, tmp_path, capsys):
    (step,) = (trained / "run").glob("step-*")
    training = json.loads((step / "training.json").read_text())
    assert len(training["data"].pop("sha256")) == 64
    (tmp_path / "training.json").write_text(json.dumps(training))
    cut = cut_of(str(tmp_path), holdout=None, validation=None)
    assert cut == Cut({"holdout": 0.02, "validation": 0.0}, "")
    cut.compare("any")
    assert "has not recorded its data" in capsys.readouterr().err


def test_a_model_that_is_no_run_has_the_plain_cut(tmp_path, capsys):
    for name in ("builtin:fashion", str(tmp_path), "org/name"):
        assert cut_of(name, holdout=None, validation=0.2) == Cut(
            {"holdout": 0.1, "validation": 0.2}
        )
    assert capsys.readouterr().err == ""
    for damaged in ({}, {"recipe": 1, "data": {}}, {"recipe": {"data": []}, "data": {}}):
        (tmp_path / "training.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match="does not say what the run was trained on"):
            cut_of(str(tmp_path), holdout=None, validation=None)


def test_pictures_without_labels_are_refused_in_words_that_help(trained, tmp_path, capsys):
    np.savez(tmp_path / "plain.npz", x=np.zeros((20, 8, 8), np.uint8))
    words = ["eval", str(trained / "run"), "--data", str(tmp_path / "plain.npz")]
    assert run(words) == 3
    assert "name them by folders, metadata.jsonl or y, or ask for --metrics nearest" in (
        capsys.readouterr().err
    )
    assert run([*words, "--metrics", "nearest", "--samples", "2"]) == 0
