"""The reveal rate that `mdiff doctor` shows: against a full enumeration, and in its output."""

from __future__ import annotations

import json
import math
from itertools import product

import pytest

from mdiff.cli import run
from mdiff.evaluation import reveal_rates, selftest


@pytest.mark.parametrize(
    ("vocab", "steps", "bits"),
    [(1, 8, 8), (2, 8, 5), (3, 5, 4), (2, 64, 5), (3, 3, 4), (2, 1024, 5)],
)
def test_the_joint_categorical_is_the_enumerated_one(vocab, steps, bits):
    grid = 2**bits
    noise = [1e-10 - math.log(k / grid + 1e-10) for k in range(grid)]
    chance = 2 / steps
    # The largest p / noise of the mask and the ids, over every value of every uniform.
    won = sum(
        chance / vocab / min(ids) > (1 - chance) / mask
        for mask, *ids in product(noise, repeat=vocab + 1)
    )
    found = reveal_rates(vocab, steps, bits=bits)["joint_categorical"]
    assert found == pytest.approx(won / grid ** (vocab + 1) / chance, abs=1e-12)


@pytest.mark.parametrize("steps", [100, 1000, 1024, 5000])
@pytest.mark.parametrize("vocab", [512, 2048, 50_257, 262_144])
def test_ours_is_nearer_to_the_true_rate(vocab, steps):
    found = reveal_rates(vocab, steps)
    assert abs(found["ours"] - 1) < 1e-6
    assert abs(found["ours"] - 1) < abs(found["joint_categorical"] - 1)
    more = reveal_rates(vocab, 2 * steps)
    assert more["joint_categorical"] <= found["joint_categorical"] + 1e-6


def test_the_rate_of_a_large_vocabulary_is_the_known_one():
    assert reveal_rates(50_257, 1024)["joint_categorical"] == pytest.approx(0.4225, abs=1e-3)
    # With finer uniforms the bias goes.
    assert reveal_rates(50_257, 1024, bits=32)["joint_categorical"] == pytest.approx(1, abs=0.01)


def test_doctor_shows_it_in_one_line_and_in_json(monkeypatch, capsys):
    monkeypatch.setattr("mdiff.evaluation.check_samplers", lambda: iter(()))
    monkeypatch.setattr(selftest.philox, "WORD", 0xFF)
    coarse = reveal_rates()
    assert abs(coarse["ours"] - 1) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr("mdiff.evaluation.check_samplers", lambda: iter(()))
    assert run(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reveal_rate"] == reveal_rates()
    assert run(["doctor"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "float32" in line]
    assert "0.423" in line
    assert "1.000000" in line
