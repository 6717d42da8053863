"""What a sweep found: bounds, differences at paired seeds, the picture and the law."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest
from sweep_runs import results_of

from mdiff.sweeps.grid import planned
from mdiff.sweeps.summary import Result, summary, table, write_picture


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


def test_values_that_are_equal_and_written_unlike_are_two_points(recipe):
    plan = planned(recipe, ["optim.lr=1,1.0"], seeds=2)
    found = summary(plan, results_of(plan, [1.0, 2.0, 5.0, 7.0]))
    assert [point.bits for point in found.points] == [(1.5, 0.5), (6.0, 1.0)]


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
