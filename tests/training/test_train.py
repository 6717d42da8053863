"""Training: what a step computes, and what a checkpoint holds."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from toy_training import (
    QUIET,
    largest_difference,
    log,
    recipe,
    same,
    tensors,
)

from mdiff.errors import ConfigError, DataError
from mdiff.files.atomic import step_path, steps, verify
from mdiff.training.build import build_run
from mdiff.training.loop import train


def test_a_checkpoint_has_what_generation_and_resuming_need(tmp_path):
    path = train(recipe(), tmp_path, **QUIET)
    assert path == step_path(tmp_path, 8)
    assert steps(tmp_path) == [3, 6, 8]
    assert set(verify(path).files) == {
        "config.json", "marks.json", "model.safetensors", "pipeline.json", "training.json",
        "training.safetensors",
    }  # fmt: skip
    pipeline = json.loads((path / "pipeline.json").read_text())
    assert pipeline["space"] == {"vocab_size": 9, "mask_id": 9, "never": [8], "parts": []}
    assert pipeline["schedule"] == {"name": "linear"}
    assert pipeline["length"] == 6
    state = tensors(path)
    averaged, raw = state["averaged/head.weight"], state["weights/head.weight"]
    assert torch.equal(state["model/head.weight"], averaged)
    assert not torch.equal(averaged, raw)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_how_rows_are_split_does_not_change_the_result(tmp_path, optimizer):
    shared = {"precision": "fp64", "model__dropout": 0.0, "optim__name": optimizer, "steps": 6}
    whole = train(recipe(**shared), tmp_path / "whole", **QUIET)
    for micro_batch in (1, 3):
        split = train(recipe(**shared, micro_batch=micro_batch), tmp_path / str(micro_batch),
                      **QUIET)  # fmt: skip
        assert largest_difference(tensors(whole), tensors(split)) < 1e-12
        losses = [[r["loss"] for r in log(path.parent)] for path in (whole, split)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_gradients_are_those_of_the_global_mean_over_maskable_tokens(tmp_path):
    gradients = []
    for micro_batch in (None, 3):
        settings = recipe(precision="fp64", model__dropout=0.0, micro_batch=micro_batch)
        accelerator = Accelerator(mixed_precision="no", cpu=True)
        run = build_run(settings, accelerator)
        rows = run.rows[5]
        total = sum(batch.valid.sum() for _, batch in rows)
        run.stepper._gradients(5, rows, total=total, seed=11)
        gradients.append([p.grad.clone() for p in run.backbone.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*gradients))


def test_a_step_that_is_not_finite_stops_the_run_and_names_its_rows(tmp_path):
    with pytest.raises(DataError, match=r"step \d: .* rows \[13\] of epoch 0"):
        train(recipe(data__poison=13, save_every=1, data__ragged=False), tmp_path, **QUIET)
    bad = len(log(tmp_path)) + 1
    assert steps(tmp_path) == list(range(1, bad))


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path):
    settings = {"data__poison": 13, "nonfinite": "skip", "save_every": 1, "data__ragged": False}
    path = train(recipe(**settings), tmp_path, **QUIET)
    skipped = [record["step"] for record in log(tmp_path) if record.get("skipped")]
    assert len(skipped) >= 2
    assert all(record["rows"] == [13] for record in log(tmp_path) if record.get("skipped"))
    before, after = (step_path(tmp_path, step) for step in (skipped[1] - 1, skipped[1]))
    assert same(tensors(before), tensors(after))
    assert all(bool(torch.isfinite(t).all()) for t in tensors(path).values())


def test_bf16_trains_float32_weights(tmp_path):
    path = train(recipe(precision="bf16", steps=2), tmp_path, **QUIET)
    assert {t.dtype for t in tensors(path).values()} == {torch.float32}


def test_an_option_that_no_part_knows_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'model.widht'.*did you mean 'model.width'"):
        train(recipe(model__widht=3), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match=r"'model.hidden_size'.*did you mean 'model.width'"):
        train(recipe(model__hidden_size=3), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match=r"model.vocab_size=5: the data gives 9"):
        train(recipe(model__vocab_size=5), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="unknown schedule 'lineer'; did you mean 'linear'"):
        train(recipe(objective__schedule={"name": "lineer"}), tmp_path, **QUIET)


def test_training_learns(tmp_path):
    settings = {"steps": 150, "model__dropout": 0.0, "data__ragged": False, "model__width": 32}
    train(recipe(**settings, save_every=150, batch_size=16), tmp_path, **QUIET)
    losses = [record["loss"] for record in log(tmp_path)]
    # A uniform guess scores ln 8 = 2.08 nats.
    assert sum(losses[-20:]) / 20 < 1.7
