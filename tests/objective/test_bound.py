"""The bound: enumerated, and its estimators against it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toys import HashDenoiser, make_toy, uniform_denoiser

from mdiff.denoiser import from_logits
from mdiff.errors import ConfigError
from mdiff.objective.bound import nll_bound
from mdiff.objective.nll import token_nll
from mdiff.schedule import SCHEDULES, Cosine, Linear, named_schedule
from mdiff.tokens import TokenSpace

TOY = make_toy(3, 4, seed=5)
SPACE = TokenSpace(7, mask_id=2, never=(5,))
every_schedule = pytest.mark.parametrize("name", sorted(SCHEDULES))


def lopsided_denoiser(length=5, vocab=4, seed=1):
    """A denoiser that is no one's conditional: its bound differs from order to order."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn((vocab + 1) ** length, length, vocab, generator=generator).double()
    base = (vocab + 1) ** torch.arange(length)
    return from_logits(lambda tokens: table[(tokens * base).sum(1)]), TokenSpace(vocab, vocab)


def mean_over_orders(denoiser, space, tokens, maskable):
    """The chain rule averaged over all orders, one by one."""
    totals = []
    for order in itertools.permutations(maskable):
        noisy = tokens.clone()
        noisy[0, list(maskable)] = space.mask_id
        total = 0.0
        for position in order:
            log_p = denoiser(noisy)[0, position].log_softmax(0)
            total -= float(log_p[tokens[0, position]])
            noisy[0, position] = tokens[0, position]
        totals.append(total)
    return sum(totals) / len(totals)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_exact_bound_is_the_mean_over_all_orders(length):
    denoiser, space = lopsided_denoiser()
    tokens = torch.tensor([[3, 0, 1, 2, 2]])
    may_hide = torch.arange(5)[None] < length
    bound = nll_bound(
        denoiser,
        tokens,
        space=space,
        schedule=Linear(),
        estimator="exact",
        seed=0,
        may_hide=may_hide,
    )
    expected = mean_over_orders(denoiser, space, tokens, range(length))
    assert float(bound.nats[0]) == pytest.approx(expected, abs=1e-10)


def test_the_expected_loss_at_uniform_ratio_is_the_mean_over_all_orders():
    """Enumerate every subset at every m and integrate: polynomials, so Gauss-Legendre is exact."""
    denoiser, space = lopsided_denoiser()
    tokens = torch.tensor([[3, 0, 1, 2, 2]])
    nodes, weights = torch.tensor(GAUSS, dtype=torch.float64).unbind(1)
    total = 0.0
    for node, quadrature in zip(nodes.tolist(), weights.tolist()):
        for hidden in itertools.product([False, True], repeat=5):
            hide = torch.tensor([hidden])
            if not any(hidden):
                continue
            chance = node ** sum(hidden) * (1 - node) ** (5 - sum(hidden))
            noisy = torch.where(hide, space.mask_id, tokens)
            nll = token_nll(denoiser(noisy), tokens, noisy, space=space)
            total += quadrature * chance * float(Linear().weight(node)) * float(nll.sum())
    expected = mean_over_orders(denoiser, space, tokens, range(5))
    assert total == pytest.approx(expected, abs=1e-10)


GAUSS = [(0.5 * (x + 1), 0.5 * w) for x, w in [
    (-0.9324695142031521, 0.1713244923791704), (-0.6612093864662645, 0.3607615730481386),
    (-0.2386191860831969, 0.4679139345726910), (0.2386191860831969, 0.4679139345726910),
    (0.6612093864662645, 0.3607615730481386), (0.9324695142031521, 0.1713244923791704),
]]  # fmt: skip


@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_estimators_are_unbiased_and_their_intervals_cover(estimator):
    """500 repeats; the 95 percent interval covers in 90 to 99 percent of them."""
    denoiser, space = lopsided_denoiser()
    tokens = torch.tensor([[3, 0, 1, 2, 2]])
    exact = float(
        nll_bound(denoiser, tokens, space=space, schedule=Linear(), estimator="exact", seed=0).nats
    )
    many = tokens.expand(500, 5)
    bound = nll_bound(
        denoiser, many, space=space, schedule=Cosine(), estimator=estimator, draws=64, seed=11
    )
    covered = ((bound.nats - exact).abs() < 1.96 * bound.stderr).double().mean()
    assert 0.90 <= float(covered) <= 0.99
    error = bound.nats.mean() - exact
    assert abs(float(error)) < 4.9 * float(bound.nats.std()) / math.sqrt(500)


def test_left_to_right_is_the_likelihood_of_that_sampler():
    tokens = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    bound = nll_bound(
        TOY.denoiser(),
        tokens,
        space=TOY.space,
        schedule=Linear(),
        estimator="left_to_right",
        seed=0,
    )
    exact = -torch.stack([TOY.joint[tuple(row)] for row in tokens.tolist()]).log()
    assert torch.allclose(bound.nats, exact, atol=1e-12)
    assert (bound.stderr == 0).all()


def test_an_ideal_denoiser_makes_the_bound_tight_in_every_order():
    tokens = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    exact = -torch.stack([TOY.joint[tuple(row)] for row in tokens.tolist()]).log()
    bound = nll_bound(
        TOY.denoiser(), tokens, space=TOY.space, schedule=Linear(), estimator="exact", seed=0
    )
    assert torch.allclose(bound.nats, exact, atol=1e-12)


def test_the_bound_is_conditional_on_any_given_subset():
    tokens = torch.tensor([[0, 2, 1, 1]])
    may_hide = torch.tensor([[True, False, True, False]])
    bound = nll_bound(
        TOY.denoiser(),
        tokens,
        space=TOY.space,
        schedule=Linear(),
        estimator="exact",
        seed=0,
        may_hide=may_hide,
    )
    conditional = TOY.joint[0, 2, 1, 1] / TOY.joint[:, 2, :, 1].sum()
    assert float(bound.nats[0]) == pytest.approx(-math.log(float(conditional)), abs=1e-12)


@every_schedule
@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_a_uniform_denoiser_scores_the_log_of_the_permitted_ids(name, estimator):
    tokens = torch.tensor([[0, 1, 3, 4, 6, 6]]).expand(4, 6)
    bound = nll_bound(
        uniform_denoiser(SPACE),
        tokens,
        space=SPACE,
        schedule=named_schedule(name),
        estimator=estimator,
        draws=500,
        seed=1,
    )
    expected = 6 * math.log(SPACE.permitted)
    assert (abs(bound.nats - expected) <= 4.9 * bound.stderr + 1e-9).all()


def test_a_time_conditioned_denoiser_is_refused_where_the_estimator_has_no_time():
    class Timed(HashDenoiser):
        uses_time = True

    for estimator in ("any_order", "exact", "left_to_right"):
        with pytest.raises(ConfigError, match="time"):
            nll_bound(
                Timed(SPACE),
                torch.ones(1, 3, dtype=torch.int64),
                space=SPACE,
                schedule=Linear(),
                estimator=estimator,
                seed=0,
            )


@pytest.mark.parametrize("options", [
    {"estimator": "exactly"}, {"draws": 1}, {"estimator": "exact", "length": 17},
])  # fmt: skip
def test_invalid_bounds_are_refused(options):
    tokens = torch.ones(1, options.pop("length", 4), dtype=torch.int64)
    with pytest.raises(ConfigError):
        nll_bound(
            uniform_denoiser(SPACE), tokens, space=SPACE, schedule=Linear(), seed=0, **options
        )
