"""Sweeps: every combination once, the same bytes whoever trains and whatever is killed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import time
from statistics import fmean, stdev

import pytest
from sweep_runs import GRID, begin, found_in, marks_of, read, text_recipe
from toy_medium import ToyRows
from toy_training import log
from volume_runs import content, started

from mdiff.cli import run
from mdiff.errors import ConfigError
from mdiff.evaluation import sample_figures
from mdiff.pipeline import load
from mdiff.pipeline.batch.division import Share
from mdiff.sweeps import job
from mdiff.sweeps.grid import planned
from mdiff.training.step import Stepper


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
    # The figures are those of samples by seed 0.
    trained_last = max((tmp_path / "out/runs/run-0001").glob("step-*"))
    drawn = load(trained_last).generate(num_samples=3, seed=0, **found["samplings"][1])
    expected = sample_figures(drawn)
    for name, (value, _) in point["samples"][1].items():
        assert value == expected[name]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "sample.temperature" in lines[0]


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
