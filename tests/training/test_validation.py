"""The bound of validation rows while a model trains, and the best checkpoint by it."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest
import torch
from toy_medium import ToyRows, backbone
from toy_training import QUIET, log, recipe, same, tensors

from mdiff import Linear, TokenSpace, nll_bound
from mdiff.errors import ConfigError, DataError
from mdiff.files.untrusted import read_tensors
from mdiff.training import loop
from mdiff.training.loop import train
from mdiff.training.validation import Validation, Validator

VALIDATED = {"validate_every": 2, "data__validation": 0.1, "validate_rows": 10}


def validations(out):
    return [line for line in log(out) if "validation_bits_per_mark" in line]


@pytest.fixture
def given_bits(monkeypatch):
    """Validations of stated bits, one after another."""

    def give(bits):
        left = iter(bits)
        monkeypatch.setattr(
            Validator, "measure", lambda self, step: Validation(step, next(left), 0.1)
        )

    return give


def test_training_is_the_same_to_the_bit_with_validation_and_without(tmp_path):
    """With dropout and averaged weights."""
    plain = train(recipe(), tmp_path / "plain", **QUIET)
    measured = train(recipe(**VALIDATED), tmp_path / "measured", **QUIET)
    assert same(tensors(plain), tensors(measured))
    steps = [line for line in log(tmp_path / "measured") if "loss" in line]
    assert steps == log(tmp_path / "plain")
    assert [line["step"] for line in validations(tmp_path / "measured")] == [2, 4, 6, 8]


def test_the_bound_is_that_of_the_published_weights_on_fixed_rows(tmp_path):
    path = train(recipe(**VALIDATED), tmp_path, **QUIET)
    model = backbone(vocab_size=9).eval()
    model.load_state_dict(read_tensors(path / "model.safetensors"))
    rows = torch.arange(10)
    batch = ToyRows(20, 6, ragged=True, poison=None).batch(rows, torch.zeros_like(rows))
    space = TokenSpace(9, mask_id=9, never=(8,))
    bound = nll_bound(
        model, batch.tokens, space=space, schedule=Linear(), valid=batch.valid, draws=8, seed=0,
        sample=rows,
    )  # fmt: skip
    scale = int(batch.valid.sum()) * 2.0 * math.log(2)
    last = validations(tmp_path)[-1]
    assert last["validation_bits_per_mark"] == pytest.approx(float(bound.nats.sum()) / scale)
    error = float(bound.stderr.square().sum().sqrt()) / scale
    assert last["validation_bits_per_mark_stderr"] == pytest.approx(error)


def test_the_best_checkpoint_is_kept_beside_the_newest_and_named(tmp_path, given_bits):
    given_bits([3.0, 1.0, 2.0, 2.5])
    train(recipe(**VALIDATED, keep=1), tmp_path, **QUIET)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000004", "step-000008"]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4


def test_a_resumed_run_knows_the_best_step_of_before(tmp_path, given_bits):
    given_bits([3.0, 1.0, 2.0, 2.5])
    train(recipe(**VALIDATED, keep=1, steps=4), tmp_path, **QUIET)
    train(recipe(**VALIDATED, keep=1), tmp_path, **QUIET)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000004", "step-000008"]
    assert [line["validation_bits_per_mark"] for line in validations(tmp_path)] == [3, 1, 2, 2.5]


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(tmp_path):
    train(recipe(**VALIDATED, optim__schedule="constant"), tmp_path / "whole", **QUIET)
    for steps in (5, 8):
        settings = recipe(**VALIDATED, steps=steps, optim__schedule="constant")
        train(settings, tmp_path / "parts", **QUIET)
    whole, parts = (validations(tmp_path / name) for name in ("whole", "parts"))
    # A run of five steps is validated after its last one too.
    assert whole == [line for line in parts if line["step"] != 5]


def test_a_run_may_begin_to_validate_when_it_is_resumed(tmp_path):
    train(recipe(steps=3, data__validation=0.1), tmp_path, **QUIET)
    train(recipe(**VALIDATED), tmp_path, **QUIET)
    assert [line["step"] for line in validations(tmp_path)] == [4, 6, 8]


def test_the_curve_has_a_line_of_training_and_one_of_validation(tmp_path):
    train(recipe(**VALIDATED), tmp_path, **QUIET)
    picture = ElementTree.parse(tmp_path / "curve.svg").getroot()
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [8, 4]
    words = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"validation", "training, running mean", "step", "bits per mark"} <= set(words)


def test_without_a_validation_split_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"set data\.validation"):
        train(recipe(validate_every=2), tmp_path / "run", **QUIET)
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_bound_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Validator, "_sums", lambda self, rows: (math.nan, 0.0, 1.0))
    with pytest.raises(DataError, match="step 2: the bound of the validation rows is not finite"):
        train(recipe(**VALIDATED), tmp_path, **QUIET)
