"""Conditions left out with the probability asked for, and parts given as often as asked for."""

from __future__ import annotations

import math

import pytest
import torch

from mdiff.errors import ConfigError
from mdiff.objective.conditioning import GivenParts, drop_condition, hideable_positions
from mdiff.objective.corruption import truncated_normal
from mdiff.process import Masking
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace
from mdiff.training.recipe import parse_recipe
from mdiff.training.step import LossOf

ROWS = 40_000
# Binomial counts stay within this many standard deviations with probability 1 - 1e-6.
SIGMAS = 4.9
SPACE = TokenSpace(9, mask_id=9, parts=((3, 0, 4), (1, 4, 6), (2, 6, 9)))
NAMES = ("a", "b", "c")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_condition_is_left_out_with_its_probability_and_not_with_one_minus_it(share):
    labels = {"label": torch.arange(ROWS) % 7}
    kept = drop_condition(
        labels, null_condition={"label": torch.tensor([7])}, share=share, seed=3,
        sample=torch.arange(ROWS),
    )["label"]  # fmt: skip
    lost = kept == 7
    sigma = math.sqrt(ROWS * share * (1 - share))
    assert abs(int(lost.sum()) - ROWS * share) < SIGMAS * sigma
    assert torch.equal(kept[~lost], labels["label"][~lost])
    assert int(labels["label"].max()) == 6, "the caller's own tensor is not written to"


def test_what_a_row_loses_depends_on_its_own_number_alone():
    cond, nothing = {"label": torch.zeros(64, dtype=torch.int64)}, {"label": torch.tensor([5])}
    number = torch.arange(64)
    whole = drop_condition(cond, null_condition=nothing, share=0.5, seed=1, sample=number)["label"]
    some = number[10:20]
    part = drop_condition(
        {"label": cond["label"][some]}, null_condition=nothing, share=0.5, seed=1, sample=some
    )["label"]
    assert torch.equal(whole[some], part)


def test_a_row_loses_all_entries_of_its_condition_or_none():
    cond = {"label": torch.zeros(500, dtype=torch.int64), "style": torch.zeros(500, 3)}
    lost = drop_condition(
        cond, null_condition={"label": torch.tensor([1]), "style": torch.ones(3)}, share=0.5,
        seed=0, sample=torch.arange(500),
    )  # fmt: skip
    assert torch.equal(lost["label"] == 1, (lost["style"] == 1).all(1))


def test_parts_are_given_as_often_as_asked_for():
    shares = {"": 2.0, "a": 1.0, "b+c": 1.0}
    policy = GivenParts.of(shares, space=SPACE, part_names=NAMES)
    hideable = policy.may_hide(seed=5, sample=torch.arange(ROWS))
    patterns = {
        "": [True] * 6,
        "a": [False] * 3 + [True] * 3,
        "b+c": [True] * 3 + [False] * 3,
    }
    for name, pattern in patterns.items():
        share = shares[name] / 4
        count = int((hideable == torch.tensor(pattern)).all(1).sum())
        assert abs(count - ROWS * share) < SIGMAS * math.sqrt(ROWS * share * (1 - share))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"d": 1.0}, "unknown part 'd'"),
        ({"a+b+c": 1.0}, "nothing to hide"),
        ({}, "positive share"),
        ({"a": -1.0}, "positive share"),
        ({"a": float("nan")}, "positive share"),
    ],
)
def test_a_policy_that_is_invalid_is_refused(shares, said):
    with pytest.raises(ConfigError, match=said):
        GivenParts.of(shares, space=SPACE, part_names=NAMES)


def test_parts_given_on_a_canvas_without_parts_are_refused():
    with pytest.raises(ConfigError, match="has no parts"):
        GivenParts.of({"": 1.0}, space=TokenSpace(4, mask_id=4), part_names=())


def test_the_positions_outside_the_given_parts_are_those_that_may_be_hidden():
    free = hideable_positions("a+c", 6, space=SPACE, part_names=NAMES)
    assert free.tolist() == [False, False, False, True, False, False]


def test_a_truncated_normal_has_the_published_mean_and_median():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    share = truncated_normal(u, mean=0.55, std=0.25, low=0.5, high=1.0)
    assert abs(float(share.mean()) - 0.694) < 1e-3
    assert abs(float(share.median()) - 0.676) < 1e-3
    assert 0.5 <= float(share.min()) <= float(share.max()) <= 1.0
    assert bool((share.diff() >= 0).all())


def loss_of(**objective):
    recipe = parse_recipe({
        "data": {"source": "x"}, "modality": {"name": "m"}, "model": {"name": "b"},
        "objective": objective, "train": {"steps": 1, "batch_size": 256},
    })  # fmt: skip
    return LossOf(torch.nn.Identity(), recipe, space=SPACE, process=Masking(Linear()))


def test_training_draws_the_share_of_hidden_tokens_from_the_truncated_normal():
    times = loss_of(ratio={}, weight="uniform").times(torch.arange(256), seed=1)
    assert 0.5 <= float(times.min()) <= float(times.max()) <= 1.0
    assert abs(float(times.mean()) - 0.694) < 0.01
    plain = loss_of().times(torch.arange(256), seed=1)
    assert abs(float(plain.mean()) - 0.5) < 0.01


def test_a_ratio_of_its_own_with_the_weight_of_the_bound_is_refused():
    with pytest.raises(ConfigError, match="weight must be uniform"):
        loss_of(ratio={})


def test_leaving_out_a_condition_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="has no condition"):
        loss_of(cond_drop=0.1)


def test_what_is_left_out_and_what_is_given_are_drawn_apart():
    sample, share = torch.arange(ROWS), 0.5
    given = GivenParts.of({"": 1, "a": 1}, space=SPACE, part_names=NAMES)
    none = given.may_hide(seed=3, sample=sample).all(1)
    labels = {"label": torch.zeros(ROWS, dtype=torch.int64)}
    lost = drop_condition(
        labels, null_condition={"label": torch.tensor([7])}, share=share, seed=3, sample=sample
    )["label"] == 7  # fmt: skip
    both = int((none & lost).sum())
    assert abs(both - ROWS / 4) < SIGMAS * math.sqrt(ROWS * 3 / 16)
