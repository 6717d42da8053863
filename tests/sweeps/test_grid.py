"""Grids: what they are read as, and what is invalid."""

from __future__ import annotations

import pytest
from sweep_runs import RECIPE, text_recipe, written_recipe

from mdiff.cli import run
from mdiff.errors import ConfigError
from mdiff.sweeps import grid, job
from mdiff.sweeps.grid import parse_grid, planned


def test_a_combination_that_cannot_be_built_fails_alone(tmp_path):
    """Heads divide the width of one value and not of the other."""
    (tmp_path / "doc.txt").write_text("hello world " * 40)
    text = text_recipe(tmp_path)
    plan = planned(text, ["model.width=4,6", "model.heads=1,2,3"])
    bad = [run for run in plan.runs if run.size is None]
    assert [tuple(run.setting.values()) for run in bad] == [(4, 3), (6, 2)]
    shard = job.RunShard(bad[0], tmp_path / "run", [], 2)
    assert "width=4, heads=3" in job.make_run(shard, report=str).error
    with pytest.raises(ConfigError, match="width=4, heads=3"):
        planned(text, ["model.heads=1,3"], overrides=["model.width=4"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.stepz=3"], "unknown key 'train.stepz'; did you mean 'train.steps'"),
        (["model.widht=3"], "did you mean"),
        (["optin.lr=3"], "unknown key 'optin'; did you mean 'optim'"),
        (["train.steps=4,four"], "train.steps='four': expected a whole number"),
        (["train.steps=4,4.5"], "train.steps=4.5: expected a whole number"),
        (["optim.lr=-1"], "optim.lr=-1: expected more than 0"),
        (["optim.lr="], "expected section.key=value"),
        (["optim.lr"], "expected section.key=value"),
        (["=3"], "expected section.key=value"),
        (["optim..lr=3"], "expected section.key=value"),
        (["optim.lr=[1"], "line 1"),
        (["optim.lr=1,2,1"], "a value is given twice"),
        (["optim.lr=1", "--grid", "optim.lr=2"], "a key is given once"),
        (["optim.lr=1", "--grid", "optim={}"], "a key is given once"),
        (["optim={}", "--grid", "optim.lr=1"], "a key is given once"),
        (["optim.lr=1", "--set", "optim.lr=2"], "a key is given once"),
        (["optim.lr=1", "--set", "optim={}"], "a key is given once"),
        (["train.seed=1,2"], "by --seeds"),
        (["sample.temprature=1"], "did you mean 'temperature'"),
        (["sample.sampler=halten"], "did you mean 'halton'"),
        (["optim.lr=1", "--seeds", "0"], "need at least 1"),
        (["optim.lr=1", "--seeds", "1001"], "1,001 runs: expected at most 1,000"),
        (["optim.lr=1", "--set", "data.validation=0"], "set data.validation"),
        (["optim.lr=0.1,0.2", "--fit", "scaling"], "neither the parameters nor the tokens change"),
        (["model.dropout=0,0.1", "--fit", "scaling"], "neither the parameters nor the tokens"),
        (["optim.lr=1", "--fit", "scalin"], "did you mean 'scaling'"),
        (["optim.lr=1", "--shard", "9/8"], "expected K/N"),
        (["optim.lr=1", "--engine", "rey"], "did you mean 'ray'"),
        (["optim.lr=1", "--workers", "0"], "expected at least 1"),
    ],
)
def test_what_is_invalid_ends_before_the_first_run(words, said, recipe, tmp_path, capsys):
    code = run(["sweep", str(recipe), "--out", str(tmp_path / "out"), "--grid", *words])
    caught = capsys.readouterr()
    assert code == 2, caught.err
    assert said in caught.err
    assert caught.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_grid_of_many_keys_is_counted_before_it_is_made(recipe):
    values = ",".join(map(str, range(1, 100)))
    keys = ("train.steps", "train.batch_size", "train.save_every", "model.width", "data.count")
    with pytest.raises(ConfigError, match="9,509,900,499 runs"):
        planned(recipe, [f"{key}={values}" for key in keys])


def test_as_many_runs_as_are_allowed_are_planned(recipe, monkeypatch):
    monkeypatch.setattr(grid, "MOST_RUNS", 4)
    assert len(planned(recipe, ["model.width=4,8"], seeds=2).runs) == 4
    with pytest.raises(ConfigError, match="6 runs: expected at most 4"):
        planned(recipe, ["model.width=4,8"], seeds=3)


def test_seeds_count_up_from_that_of_the_recipe(recipe):
    plan = planned(recipe, ["model.width=4"], overrides=["train.seed=5"], seeds=3)
    assert [(run.seed, run.recipe.train.seed) for run in plan.runs] == [(5, 5), (6, 6), (7, 7)]


def test_validations_are_those_of_the_recipe_or_one_at_the_end(recipe):
    for overrides, every in (((), 2), (["train.validate_every=1"], 1)):
        (run,) = planned(recipe, ["model.width=4"], overrides=overrides).runs
        assert run.recipe.train.validate_every == every


def test_values_are_yaml_and_may_hold_commas():
    assert parse_grid(["a.b=1e-3, null,'x,y'", "c={name: linear},[1, 2]"]) == {
        "a.b": [0.001, None, "x,y"], "c": [{"name": "linear"}, [1, 2]]
    }  # fmt: skip


def test_a_section_is_a_value_too(tmp_path):
    recipe = written_recipe(tmp_path)
    grid = ["objective.schedule={name: linear},{name: cosine}", "objective.weight=bound,uniform"]
    plan = planned(recipe, grid)
    assert [(r.recipe.objective.schedule.name, r.recipe.objective.weight) for r in plan.runs] == [
        (s, w) for s in ("linear", "cosine") for w in ("bound", "uniform")
    ]  # fmt: skip
    assert RECIPE in recipe.read_text()
