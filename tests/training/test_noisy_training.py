"""Training under noise that also writes random tokens, and what is done with such a model."""

import json
from dataclasses import replace

import pytest
import torch
from toy_training import QUIET, log, recipe, same, tensors

import mdiff
from mdiff import CheckpointError, ConfigError
from mdiff.cli import run
from mdiff.cli.inspect import inspected
from mdiff.files import locate
from mdiff.process import Masking, Mixed, Uniform
from mdiff.schedule import Cosine
from mdiff.training.build import process_of
from mdiff.training.loop import train
from mdiff.training.recipe import parse_recipe

MIXED = {"objective__process": {"name": "mixed", "p_uniform": 0.3}}
TEXT = "to be or not to be, that is the question. " * 40


def text_recipe(tmp_path, **objective):
    """A tiny model of characters."""
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "data": {"source": str(tmp_path / "text.txt"), "length": 16, "validation": 0.2},
        "modality": {"name": "text", "tokenizer": "byte"},
        "model": {"name": "transformer", "width": 32, "depth": 2, "heads": 2},
        "objective": objective,
        "train": {
            "steps": 60, "batch_size": 16, "save_every": 60, "validate_every": 60,
            "validate_rows": 8,
        },
        "optim": {"lr": 0.01},
    }  # fmt: skip


@pytest.mark.parametrize(("process", "weight", "predicts"), [
    ({"name": "uniform"}, "bound", "leave_one_out"),
    ({"name": "mixed", "p_uniform": 0.2}, "dynamic", "leave_one_out"),
    pytest.param(
        {"name": "logistic", "shift": 0.5}, "uniform", "leave_one_out", marks=pytest.mark.slow
    ),
    ({"name": "mixed", "p_uniform": 0.2}, "cross_entropy", "posterior"),
])  # fmt: skip
def test_a_model_is_trained_saved_loaded_sampled_and_scored(tmp_path, process, weight, predicts):
    content = text_recipe(tmp_path, process=process, weight=weight, max_weight=50.0)
    path = train(parse_recipe(content), tmp_path / "run", **QUIET)
    described = json.loads((path / "pipeline.json").read_text())
    assert described["process"]["predicts"] == predicts
    pipeline = mdiff.load(path)
    assert pipeline.denoiser.predicts == predicts
    (made,) = pipeline.generate("to be", length=16, steps=8, seed=1)
    assert str(made).startswith("to be")
    # The bound fell: below that of bytes that are all as likely.
    lines = [line for line in log(tmp_path / "run") if "validation_bits_per_byte" in line]
    if weight != "dynamic":
        assert lines[-1]["validation_bits_per_byte"] < 8
    assert float(pipeline.score(["to be or not to"], draws=8).nats) > 0
    revised = pipeline.revise("to be or not to", rounds=3, strength=0.8, keep=[(0, 5)], seed=2)
    assert revised[0].output.startswith("to be")
    assert revised[0].calls == 3
    with pytest.raises(ConfigError, match="the noise that the model was trained on; ancestral"):
        pipeline.generate("to be", sampler="first_hitting")
    (tmp_path / "own.txt").write_text("to be")
    assert run(["eval", str(path), "--data", str(tmp_path / "own.txt"), "--draws", "2"]) == 0
    shown = inspected("it", locate(str(path)))
    assert str(process["name"]) in shown["noise"].lower()
    assert ("given all others" in shown["predicts"]) == (predicts == "leave_one_out")
    pipeline.save(tmp_path / "saved")
    again = mdiff.load(tmp_path / "saved")
    assert (again.process, again.denoiser.predicts) == (pipeline.process, predicts)
    assert again.generate("to be", length=16, steps=8, seed=1)[0].tokens == made.tokens


def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path):
    steady = MIXED | {"optim__schedule": "constant"}
    whole = train(recipe(**steady), tmp_path / "whole", **QUIET)
    train(recipe(steps=5, **steady), tmp_path / "parts", **QUIET)
    parts = train(recipe(**steady), tmp_path / "parts", resume="auto", **QUIET)
    assert same(tensors(whole), tensors(parts))


def test_another_process_is_another_run(tmp_path):
    train(recipe(steps=3, **MIXED), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="process"):
        train(recipe(), tmp_path, resume="auto", **QUIET)


def test_micro_batches_add_up(tmp_path):
    whole = train(recipe(model={"name": "toy_medium:backbone"}, **MIXED), tmp_path / "a", **QUIET)
    parts = train(
        recipe(model={"name": "toy_medium:backbone"}, micro_batch=2, **MIXED), tmp_path / "b",
        **QUIET,
    )  # fmt: skip
    one, two = tensors(whole), tensors(parts)
    assert all(torch.allclose(one[k].double(), two[k].double(), atol=2e-5) for k in one)


@pytest.mark.parametrize(("objective", "message"), [
    ({"process": {"name": "unifrom"}}, "uniform"),
    ({"process": {"name": "mixed", "p_uniform": 1.0}}, "p_uniform"),
    ({"process": {"name": "mixed"}, "label_smoothing": 0.1}, "label_smoothing"),
    ({"process": {"name": "mixed"}, "ratio": {}, "weight": "uniform"}, "ratio"),
    ({"process": {"name": "uniform"}, "weight": "dynamic"}, "mixed"),
    ({"weight": "dynamic"}, "objective.process"),
    ({"weight": "cross_entropy"}, "objective.process"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_before_the_first_step(tmp_path, objective, message):
    keys = {f"objective__{name}": value for name, value in objective.items()}
    with pytest.raises(ConfigError, match=message):
        train(recipe(**keys), tmp_path, **QUIET)


def test_a_pipeline_json_of_a_process_that_is_none_is_damage(tmp_path):
    content = text_recipe(tmp_path, process={"name": "mixed", "p_uniform": 0.3})
    content["train"] = {"steps": 1, "batch_size": 2}
    path = train(parse_recipe(content), tmp_path / "run", **QUIET)
    described = json.loads((path / "pipeline.json").read_text())
    assert mdiff.load(path).process == Mixed(p_uniform=0.3)
    for process in (
        {"name": "mixed", "p_uniform": 2.0, "predicts": "posterior"},
        {"name": "mixed", "p_uniform": 0.2},
        {"name": "mixed", "p_uniform": "a", "predicts": "posterior"},
        {"name": "no", "predicts": "posterior"}, [], "mixed",
    ):  # fmt: skip
        (path / "pipeline.json").write_text(json.dumps(described | {"process": process}))
        with pytest.raises(CheckpointError, match=r"pipeline\.json"):
            mdiff.load(path)


def test_a_process_that_only_hides_is_none(tmp_path):
    """In a recipe, in its pipeline.json and in a pipeline: the same weights, tokens and scores."""
    small = {"steps": 4, "batch_size": 4, "save_every": 4, "validate_every": 2}
    runs = []
    for name, objective in (("plain", {}), ("named", {"process": {"name": "masking"}})):
        content = text_recipe(tmp_path, max_weight=20.0, **objective) | {"train": small}
        runs.append(train(parse_recipe(content), tmp_path / name, **QUIET))
    assert same(tensors(runs[0]), tensors(runs[1]))
    assert "process" not in (runs[0] / "pipeline.json").read_text()
    assert (runs[0] / "pipeline.json").read_text() == (runs[1] / "pipeline.json").read_text()
    plain = mdiff.load(runs[0])
    named = replace(plain, process=Masking(plain.schedule))
    for made in ({}, {"sampler": "psi", "steps": 4}, {"sampler": "remdm", "steps": 4}):
        one, two = (each.generate("to", length=9, **made)[0] for each in (plain, named))
        assert (one.tokens, one.calls) == (two.tokens, two.calls)
    assert torch.equal(plain.score("to be").nats, named.score("to be").nats)
    assert plain.revise("to be")[0].tokens == named.revise("to be")[0].tokens


def test_schedules_of_a_process_are_the_recipes():
    found = process_of(recipe(objective__process={"name": "uniform"}, objective__schedule={
        "name": "cosine"}))  # fmt: skip
    assert found == Uniform(Cosine())
