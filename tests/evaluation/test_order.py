"""The spread of the likelihood over orders: against enumeration, and by the command."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from toys import HashDenoiser, make_toy

from mdiff.denoiser import from_logits
from mdiff.errors import ConfigError, DataError
from mdiff.evaluation import order_figures
from mdiff.modalities.ids import ids as ids_modality
from mdiff.objective import nll_bound
from mdiff.pipeline.pipeline import Pipeline
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace, Windows

TOY = make_toy()
ORDERS = list(permutations(range(TOY.length)))


def pipeline(denoiser, space=TOY.space):
    return Pipeline(denoiser, space, ids_modality(vocab_size=space.vocab_size), Linear(), window=16)


def rows(*tokens, space=TOY.space):
    return Windows([list(row) for row in tokens], list(range(len(tokens))), space)


def inconsistent():
    """A denoiser whose conditionals are those of no joint, and its table of log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(TOY.table.shape, generator=generator, dtype=torch.float64).log_softmax(2)
    return from_logits(lambda tokens: table[TOY.number(tokens)]), table


def chain(table, row, order):
    """-log p of a row under one order, a position at a time."""
    canvas, nats = [TOY.vocab] * TOY.length, 0.0
    for position in order:
        number = int(TOY.number(torch.tensor([canvas])))
        nats -= float(table[number, position, row[position]])
        canvas[position] = row[position]
    return nats


def test_the_conditionals_of_one_joint_have_no_spread():
    data = [[0, 2, 1, 1], [2, 2, 0, 1], [3, 0, 3, 2]]
    found = order_figures(pipeline(TOY.denoiser()), rows(*data), orders=12, seed=1)
    exact = -torch.stack([TOY.joint[tuple(row)] for row in data]).log().mean() / TOY.length
    assert found["nats_per_token"] == pytest.approx(float(exact), abs=1e-10)
    assert abs(found["spread"]) < 1e-10
    assert abs(found["left_to_right"]) < 1e-10
    assert (found["rows"], found["orders"], found["tokens"]) == (3, 12, 12)


def test_a_random_order_is_one_of_all_orders_each_as_often():
    denoiser, table = inconsistent()
    row, count = [0, 2, 1, 1], 2_400
    bound = nll_bound(
        denoiser, torch.tensor([row]).expand(count, -1), space=TOY.space, schedule=Linear(),
        estimator="random_order", seed=3,
    )  # fmt: skip
    number = {round(chain(table, row, order), 9): i for i, order in enumerate(ORDERS)}
    assert len(number) == len(ORDERS)
    drawn = Counter(number[round(nats, 9)] for nats in bound.nats.tolist())
    assert len(drawn) == len(ORDERS)
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-6
    assert (bound.stderr == 0).all()


def test_the_spread_of_an_inconsistent_table_is_the_enumerated_one():
    denoiser, table = inconsistent()
    row, count = [3, 0, 3, 2], 4_000
    each = np.array([chain(table, row, order) for order in ORDERS]) / TOY.length
    found = order_figures(pipeline(denoiser), rows(row), orders=count, batch_size=500)
    assert found["nats_per_token"] == pytest.approx(each.mean(), abs=4.9 * each.std() / count**0.5)
    fourth = ((each - each.mean()) ** 4).mean()
    error = math.sqrt((fourth - each.var() ** 2) / count) / (2 * each.std())
    assert found["spread"] == pytest.approx(each.std(), abs=4.9 * error)
    in_turn = chain(table, row, range(TOY.length)) / TOY.length - found["nats_per_token"]
    assert found["left_to_right"] == pytest.approx(in_turn, abs=1e-10)
    assert found["spread_stderr"] is None
    # The mean over all orders is the exact bound.
    exact = nll_bound(
        denoiser, torch.tensor([row]), space=TOY.space, schedule=Linear(), estimator="exact", seed=0
    )
    assert float(exact.nats) / TOY.length == pytest.approx(each.mean(), abs=1e-12)


def test_the_figures_do_not_depend_on_the_batch_and_rows_are_spaced_evenly():
    space = TokenSpace(11, mask_id=11)
    model = pipeline(HashDenoiser(space), space)
    random = torch.Generator().manual_seed(0)
    data = [torch.randint(0, 11, (n,), generator=random).tolist() for n in (5, 9, 3, 9, 7, 1)]
    data = rows(*data, space=space)
    found = [order_figures(model, data, orders=5, seed=2, batch_size=n) for n in (1, 4, 32)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)
    assert found[0]["spread"] > 0.01
    assert found[0]["spread_stderr"] > 0
    few = order_figures(model, data, orders=5, limit=3)
    assert (few["rows"], few["tokens"]) == (3, 5 + 3 + 7)
    other = order_figures(model, data, orders=5, seed=3)
    assert other["spread"] != found[0]["spread"]


def test_what_has_no_order_is_refused():
    model = pipeline(TOY.denoiser())
    with pytest.raises(ConfigError, match="orders=1: need at least 2"):
        order_figures(model, rows([0, 1, 2, 3]), orders=1)
    with pytest.raises(DataError, match="no token"):
        order_figures(model, rows(), orders=2)
    timed = TOY.denoiser()
    timed.uses_time = True
    with pytest.raises(ConfigError, match="metric order: this denoiser uses the time"):
        order_figures(pipeline(timed), rows([0, 1, 2, 3]), orders=2)
