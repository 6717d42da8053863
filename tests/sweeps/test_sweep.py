"""Sweeps: every combination once, the same bytes whoever trains and whatever is killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import sys
import time
from statistics import fmean, stdev
from xml.etree import ElementTree

import pytest
from sweep_runs import GRID, RECIPE, begin, written_recipe
from toy_medium import ToyRows
from toy_training import log
from volume_runs import content, server, started

from mdiff.cli import run
from mdiff.errors import ConfigError
from mdiff.pipeline.batch import engines
from mdiff.pipeline.batch.division import Share
from mdiff.sweeps import job
from mdiff.sweeps.grid import parse_grid, planned
from mdiff.sweeps.summary import Result, summary, table, write_picture
from mdiff.training.step import Stepper


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return written_recipe(tmp_path_factory.mktemp("recipes"))


@pytest.fixture(scope="module")
def clean(recipe, tmp_path_factory):
    """The folder of one uninterrupted sweep of four runs in one process, and what it found."""
    out = tmp_path_factory.mktemp("clean") / "out"
    return out, begin(recipe, GRID, out)[0]


@pytest.fixture
def fast_workers(monkeypatch):
    context = server()
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)


def found_in(out):
    """What a sweep leaves but checkpoints: the collected files and the results of the runs."""
    return {name: held for name, held in content(out).items() if "/run-" not in name} | {
        name: held for name, held in content(out).items() if name.count("/") == 1
    }


def read(out):
    return json.loads((out / "sweep.json").read_text())


def results_of(plan, bits, errors=()):
    errors = errors or [0.1] * len(plan.runs)
    return [Result(bits=b, stderr=e) for b, e in zip(bits, errors)]


def test_each_combination_is_trained_at_each_seed_and_its_last_bound_collected(clean):
    out, _ = clean
    points = read(out)["points"]
    assert [point["setting"] for point in points] == [{"model.width": 4}, {"model.width": 8}]
    for number, point in enumerate(points):
        last = [log(out / "runs" / f"run-{2 * number + seed:04d}")[-1] for seed in (0, 1)]
        assert [line["step"] for line in last] == [2, 2]
        bits = [line["validation_bits_per_mark"] for line in last]
        assert bits[0] != bits[1]
        assert point["bits"] == pytest.approx([fmean(bits), stdev(bits) / math.sqrt(2)])
        assert point["seeds"] == [0, 1]
        # Of the embedding none: a layer of twice the width, and the head.
        width = point["setting"]["model.width"]
        assert point["parameters"] == 2 * width * width + width + 9 * width + 9
        assert point["tokens"] == 2 * 8 * 6
    assert read(out)["failures"] == []
    assert (out / "failures.jsonl").read_bytes() == b""


def test_differences_to_the_best_are_those_of_runs_with_the_same_seed(recipe):
    plan = planned(recipe, ["model.width=4,8", "train.steps=1,2"], seeds=2)
    found = summary(plan, results_of(plan, [5.0, 3.0, 4.0, 2.5, 9.0, 1.0, 8.0, 9.5]))
    bits = [number for point in found.points for number in point.bits]
    assert bits == pytest.approx([4.0, 1.0, 3.25, 0.75, 5.0, 4.0, 8.75, 0.75])
    apart = [number for point in found.points for number in point.difference]
    assert apart == pytest.approx([0.75, 0.25, 0.0, 0.0, 1.75, 3.25, 5.5, 1.5])
    assert found.points[1].difference == (0.0, 0.0)
    lines = table(found)
    assert lines[0].split()[:3] == ["model.width", "train.steps", "bits/mark"]
    assert lines[3].split()[:6] == ["8", "1", "5.0000", "±", "4.0000", "+1.7500"]
    assert len(lines) == 5


def test_seeds_that_failed_are_in_no_pair(recipe):
    plan = planned(recipe, ["model.width=4,8"], seeds=3)
    results = results_of(plan, [1.0, 2.0, 3.0, 5.0, 7.0, 9.0])
    results[0] = results[4] = Result(error="x")
    found = summary(plan, results)
    assert [point.seeds for point in found.points] == [[1, 2], [0, 2]]
    assert found.points[0].bits == (2.5, 0.5)
    # At the third seed alone, by the errors of the two estimates.
    assert found.points[1].difference == (6.0, pytest.approx(math.hypot(0.1, 0.1)))
    assert [f["run"] for f in found.failures] == [0, 4]
    none = summary(plan, [Result(error="x")] * 6)
    assert table(none)[1].split()[:3] == ["4", "-", "-"]


def test_a_single_seed_has_the_error_of_its_estimate(recipe):
    plan = planned(recipe, ["optim.lr=0.02,0.1"])
    found = summary(plan, results_of(plan, [1.0, 3.0], [0.3, 0.4]))
    assert [point.bits for point in found.points] == [(1.0, 0.3), (3.0, 0.4)]
    assert [point.difference for point in found.points] == [(0.0, 0.0), (2.0, 0.5)]


def test_the_picture_has_a_curve_for_each_value_of_the_other_keys(recipe, tmp_path):
    for grid, curves, axis in (
        (["model.width=4,8,6", "train.steps=1,2"], 2, "model.width"),
        (["train.steps=1,2", "optim.name=muon,adamw"], 2, "train.steps"),
        (["optim.name=muon,adamw"], 2, "row of the table"),
        (["optim.weight_decay=0,1"], 2, "row of the table"),
    ):
        plan = planned(recipe, grid)
        write_picture(summary(plan, results_of(plan, itertools.count(1.0))), tmp_path / "a.svg")
        ElementTree.parse(tmp_path / "a.svg")
        text = (tmp_path / "a.svg").read_text()
        assert text.count("<polyline") == curves
        assert f">{axis}</text>" in text


def test_the_same_command_again_trains_nothing(clean, recipe, monkeypatch):
    out = clean[0]
    before = content(out)
    monkeypatch.setattr(job, "train", None)
    _, said = begin(recipe, GRID, out)
    assert said == ["4 of 4 shards are there already"]
    assert content(out) == before


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one(clean, recipe, tmp_path, fast_workers):
    begin(recipe, GRID, tmp_path / "out", workers=2)
    assert content(tmp_path / "out") == content(clean[0])


def test_shares_in_any_order_give_the_bytes_of_one_process(clean, recipe, tmp_path):
    out = tmp_path / "out"
    found, said = begin(recipe, GRID, out, share=Share(2, 2))
    assert found is None
    assert "other runs" in said[-1]
    assert not (out / "sweep.json").exists()
    begin(recipe, GRID, out, share=Share(1, 2))
    assert content(out) == content(clean[0])


def test_a_run_is_resumed_from_its_checkpoint(clean, recipe, tmp_path, monkeypatch):
    """Interrupted in the second step of the second run: the first one is not run again."""
    plain, calls = Stepper.step, []

    def interrupted(self, number, rows, **options):
        calls.append(number)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(self, number, rows, **options)

    out, every = tmp_path / "out", ["train.save_every=1"]
    monkeypatch.setattr(Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted: 1 of 2 shards are complete"):
        begin(recipe, ["model.width=4"], out, overrides=every)
    begin(recipe, ["model.width=4"], out, overrides=every)
    assert calls == [1, 2, 1, 2, 2]
    assert read(out)["points"][0]["bits"] == read(clean[0])["points"][0]["bits"]


def marks_of(out):
    """What tells that a sweep goes on: checkpoints and results."""
    return {*out.glob("runs/*.json"), *out.glob("runs/*/step-*")}


def killed_often(recipe, clean, tmp_path, trials, **division):
    """Kill sweeps at random moments after something new is there; how many kills there were."""
    chance, kills = random.Random(1), 0
    for trial in range(trials):
        out = tmp_path / str(trial)
        for _ in range(40):
            before = marks_of(out)
            process = started(begin, recipe, GRID, out, **division)
            while process.is_alive() and marks_of(out) <= before:
                time.sleep(0.01)
            process.join(chance.uniform(0.0, 0.4))
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert found_in(out) == found_in(clean)
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_that_is_killed_and_run_again_leaves_the_bytes_of_a_clean_one(
    clean, recipe, tmp_path, workers
):
    assert killed_often(recipe, clean[0], tmp_path, 3, workers=workers) > 3


def test_a_run_that_fails_is_named_and_the_others_are_made(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sweep", str(recipe), "--grid", "data.poison=3,null", "--out", str(out)]
    assert run(words) == 3
    said = capsys.readouterr()
    assert "error: 1 of 2 runs failed, see" in said.err
    assert "the loss or its gradient is not finite in rows [3]" in said.err
    (failed,) = [json.loads(line) for line in (out / "failures.jsonl").open()]
    assert (failed["run"], failed["setting"]) == (0, {"data.poison": 3})
    assert [point["bits"] is None for point in read(out)["points"]] == [True, False]
    assert said.out.splitlines()[1].split()[:3] == ["3", "-", "-"]
    # It is tried again, as its cause may have gone.
    before = content(out)
    assert run(words) == 3
    assert "1 of 2 shards are there already" in capsys.readouterr().err
    assert found_in(out) == {name: before[name] for name in found_in(out)}


@pytest.mark.slow
def test_a_run_that_crashes_its_workers_is_named_and_the_others_are_made(
    recipe, tmp_path, fast_workers
):
    grid = ["data.deadly=false,true", "train.steps=2"]
    found, _ = begin(recipe, grid, tmp_path / "out", seeds=1, workers=2)
    (failed,) = found.failures
    assert failed["run"] == 1
    assert "3 workers crashed at it alone, the last by signal 9" in failed["error"]
    assert found.points[0].bits is not None


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


def text_recipe(folder):
    path = folder / "text.yaml"
    path.write_text(
        f"data: {{source: {folder / 'doc.txt'}, length: 8, validation: 0.3}}\n"
        "modality: {name: text, tokenizer: byte}\n"
        "model: {name: transformer, width: 4, depth: 1, heads: 1}\n"
        "train: {steps: 1, batch_size: 2, validate_rows: 2}\n"
    )
    return path


def test_one_training_serves_all_settings_of_sampling(tmp_path, monkeypatch, capsys):
    (tmp_path / "doc.txt").write_text("hello world " * 40)
    trained, plain = [], job.train
    monkeypatch.setattr(job, "train", lambda *a, **k: trained.append(a) or plain(*a, **k))
    words = ["sweep", str(text_recipe(tmp_path)), "--grid", "optim.lr=0.1,0.01", "--samples", "3",
             "--grid", "sample.temperature=0,1", "--grid", "sample.sampler=confidence",
             "--out", str(tmp_path / "out")]  # fmt: skip
    assert run([*words, "--grid", "sample.nosuch=1"]) == 2
    assert "nosuch" in capsys.readouterr().err
    assert run(words) == 0
    assert len(trained) == 2
    found = read(tmp_path / "out")
    assert found["samplings"] == [{"sampler": "confidence", "temperature": t} for t in (0, 1)]
    for point in found["points"]:
        cold, warm = (figures["unigram_entropy_bits"][0] for figures in point["samples"])
        assert cold < warm
        assert "seconds" not in point["samples"][0]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "sample.temperature" in lines[0]


def test_a_law_is_fitted_or_it_is_said_why_not(recipe):
    plan = planned(recipe, ["model.width=4,8", "train.steps=1,2"], fit=True)
    found = summary(plan, results_of(plan, itertools.count(1.0)))
    assert found.fit == "N has 2 different values: a term of the law needs at least 3"
    assert table(found)[-1] == f"no scaling law: {found.fit}"
    plan = planned(recipe, ["train.steps=2,3,4,6,9"], fit=True, seeds=2)
    bits = [1 + 30 / run.scale[1] ** 0.6 for run in plan.runs]
    found = summary(plan, results_of(plan, bits))
    assert found.fit.values == pytest.approx({"E": 1.0, "B": 30.0, "b": 0.6}, rel=1e-4)
    assert found.content()["fit"]["intervals"].keys() == {"E", "B", "b"}
    assert table(found)[-1].split()[0] == "b"
    assert isinstance(summary(plan, [Result(error="x")] * 10).fit, str)


def test_a_result_of_other_data_is_not_taken(recipe, tmp_path, monkeypatch):
    out = tmp_path / "out"
    begin(recipe, ["optim.lr=0.1"], out, seeds=1)
    monkeypatch.setattr(ToyRows, "version", 2)
    found, _ = begin(recipe, ["optim.lr=0.1"], out, seeds=1)
    assert "the data is not that of" in found.failures[0]["error"]


def test_a_damaged_result_and_one_of_another_run_are_none(clean, recipe, tmp_path):
    plan = planned(recipe, GRID, seeds=2)
    shard = job.RunShard(plan.runs[3], tmp_path / "runs" / "run-0003", [], 2)
    shard.clear()
    good = (clean[0] / "runs" / "run-0003.json").read_bytes()
    other = (clean[0] / "runs" / "run-0002.json").read_bytes()
    wrong = [b"", b"{", b"[]", b'{"bits": 1.0}', b"\xff", good[:-9], other]
    wrong += [good.replace(b"bits", b"bitz"), re.sub(rb'(?<="bits": )[0-9.]+', b"NaN", good)]
    for held in wrong:
        assert held != good
        shard.path.write_bytes(held)
        assert not shard.is_complete()
        shard.clear()
        assert not shard.path.exists()
    shard.path.write_bytes(good)
    shard.clear()
    assert shard.is_complete()


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


def test_a_folder_of_another_sweep_is_refused_with_both_named(clean, recipe, tmp_path, capsys):
    before = content(clean[0])
    for grid, overrides, said in (
        (["model.width=4"], (), r"model.width was \[4, 8\], now \[4\]"),
        (GRID, ["optim.lr=0.5"], r"recipe.optim.lr was 0.02, now 0.5"),
    ):
        with pytest.raises(ConfigError, match=said):
            begin(recipe, grid, clean[0], overrides=overrides)
    assert content(clean[0]) == before
    (tmp_path / "other.txt").touch()
    with pytest.raises(ConfigError, match=r"holds other\.txt and no plan"):
        begin(recipe, GRID, tmp_path)
    # How a run is logged changes no result.
    begin(recipe, GRID, clean[0], overrides=["log.every=3"])


def test_a_launcher_is_refused_and_a_missing_engine_named(recipe, tmp_path, monkeypatch, capsys):
    words = ["sweep", str(recipe), "--out", str(tmp_path / "out"), "--grid", "optim.lr=1"]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run([*words, "--engine", "ray"]) == 5
    assert "mdiff-toolkit[ray]" in capsys.readouterr().err
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    assert run([*words, "--shard", "1/2"]) == 2
    assert "without, or as an array of jobs" in capsys.readouterr().err


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
