"""`mdiff bench --samplers`: no sampler escapes, and the figures are of what they say."""

from __future__ import annotations

import json

import pytest
import torch

from mdiff.cli import run
from mdiff.evaluation import bench
from mdiff.evaluation.bench import Amount, samplers
from mdiff.evaluation.bench.samplers import jackknife, sampler_rows, settings_of, toy_floor
from mdiff.find import names

EXACT = ("first_hitting", "any_order", "halton", "blocks")
FEW = Amount(toy=1_500, text=2, length=2, pictures=0)


def quiet(_):
    """No progress."""


@pytest.fixture(scope="module")
def rows():
    return list(sampler_rows(FEW, quiet))


def test_every_sampler_is_measured_on_the_toy_and_on_a_model(rows):
    for where in (samplers.TOY, samplers.TEXT):
        assert {row.sampler for row in rows if row.where == where} == set(names("samplers"))
    for row in rows:
        assert row.note or (row.calls >= 1 and row.figures), row


def test_the_total_variation_is_the_sampling_floor_where_the_law_is_the_joint(rows):
    floor = toy_floor(FEW.toy)
    first = {row.sampler: row for row in reversed(rows) if row.where == samplers.TOY}
    for name in EXACT:
        assert first[name].law == "joint"
        assert first[name].figures["tv"][0] < 1.5 * floor
    assert first["confidence"].law == "own"
    assert first["confidence"].figures["tv"][0] > 4 * floor


def test_the_floor_is_that_of_samples_of_the_joint():
    p = samplers.toy()[0].flatten()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(p.expand(50, -1), 2_000, replacement=True, generator=generator)
    apart = torch.stack([torch.bincount(row, minlength=len(p)) / 2_000 - p for row in drawn])
    found = apart.abs().sum(1) / 2
    # Fixed seed; the classes are few enough in places for the normal form to be off by percents.
    assert float(found.mean()) == pytest.approx(toy_floor(2_000), rel=0.1)


def test_only_what_takes_tokens_back_writes_any_again(rows):
    again = {row.sampler: row.taken_back for row in rows if row.where == samplers.TOY}
    assert again["gibbs"] > 1
    assert all(again[name] == 0 for name in EXACT)


def test_the_options_on_a_model_are_meant_for_sixteen_calls():
    assert settings_of("first_hitting", 128) == [{"per_call": 8}]
    assert settings_of("remdm", 128) == [{"steps": 16}]
    assert {"noise", "steps"} in [set(options) for options in settings_of("confidence")]


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(20, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, error = jackknife(lambda some: float(some.mean()), values)
    assert value == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std()) / 20**0.5)


def test_the_command_prints_one_object_and_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(samplers, "names", lambda room: ["first_hitting", "gibbs"])
    monkeypatch.setattr(bench.Amount, "quick", lambda: Amount(toy=500, text=0, pictures=0))
    out = tmp_path / "bench.json"
    assert run(["bench", "--samplers", "--quick", "--json", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == report
    assert report["sections"] == ["samplers"]
    assert not report["interrupted"]
    assert report["tv_of_the_joint"] == toy_floor(500)
    assert {row["sampler"] for row in report["rows"]} == {"first_hitting", "gibbs"}
    assert run(["bench", "--samplers", "--quick"]) == 0
    table = capsys.readouterr().out
    assert "gibbs(sweeps=4.0)" in table
    assert "first_hitting(per_call=4)" in table


@pytest.mark.parametrize("words", [["--full"], ["--only", "draw"], ["--full", "--quick"]], ids=str)
def test_options_of_the_other_sections_are_refused(words, capsys):
    assert run(["bench", "--samplers", *words]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_pictures_have_a_frechet_distance(monkeypatch):
    monkeypatch.setattr(samplers, "names", lambda room: ["blocks", "confidence", "remdm"])
    found = [
        row for row in sampler_rows(Amount(toy=200, text=0, pictures=3), quiet)
        if row.where == samplers.PICTURES
    ]  # fmt: skip
    assert {row.sampler for row in found if row.note} == {"blocks"}
    assert all("frechet" in row.figures for row in found if not row.note)
