"""Schedules: ends, inverse, and the weight as the derivative of the form in the docstring."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from toys import make_toy

from mdiff.errors import ConfigError
from mdiff.objective.bound import nll_bound
from mdiff.schedule import (
    MIN_TIME,
    SCHEDULES,
    STEEPEST,
    Arccos,
    Cosine,
    Exponential,
    Geometric,
    Linear,
    Polynomial,
    named_schedule,
)

mpmath.mp.dps = 50
LO, HI = mpmath.mpf(1e-5), mpmath.mpf(20)
FORMS = {
    Linear(): lambda t: t,
    Cosine(): lambda t: mpmath.sin(mpmath.pi * t / 2),
    Polynomial(): lambda t: t**2,
    Polynomial(3.5): lambda t: t ** mpmath.mpf(3.5),
    Arccos(): lambda t: 4 / mpmath.pi * mpmath.asin(mpmath.sqrt(t / 2)),
    Exponential(): lambda t: mpmath.expm1(-5 * t) / mpmath.expm1(-5),
    Geometric(): lambda t: (
        mpmath.expm1(-LO * mpmath.expm1(t * mpmath.log(HI / LO))) / mpmath.expm1(LO - HI)
    ),
}
TIMES = [MIN_TIME, 1e-6, 1e-3, 0.01, 0.1, 0.25, 0.49999, 0.5, 0.75, 0.9, 0.999, 1 - 1e-7]
every_schedule = pytest.mark.parametrize("schedule", FORMS, ids=str)


@every_schedule
def test_the_ends_hold_and_the_form_increases(schedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    m = schedule.mask_prob(t)
    assert float(m[0]) == 0
    assert float(m[-1]) == pytest.approx(1, abs=1e-15)
    assert (m[1:] > m[:-1]).all()


@every_schedule
def test_the_weight_is_the_derivative_of_the_log_of_the_form(schedule):
    form = FORMS[schedule]
    for t in TIMES:
        point = mpmath.mpf(t)
        exact = mpmath.diff(form, point, h=point * mpmath.mpf(10) ** -20) / form(point)
        assert float(schedule.weight(t)) == pytest.approx(float(exact), rel=1e-12)
        assert float(schedule.mask_prob(t)) == pytest.approx(float(form(point)), rel=1e-12)


@every_schedule
def test_the_weight_is_finite_and_not_negative(schedule):
    t = torch.cat([torch.tensor([MIN_TIME, 1.0]), torch.rand(1000).clamp(min=MIN_TIME)])
    for times in (t, t.double()):
        weight = schedule.weight(times)
        assert weight.dtype == times.dtype
        assert torch.isfinite(weight).all()
        assert (weight >= 0).all()


@every_schedule
def test_time_at_inverts_in_float64(schedule):
    t = torch.linspace(0, 0.99, 500, dtype=torch.float64)
    m = schedule.mask_prob(t)
    # Where m is flat a rounding of m moves t by eps / m'(t): no inverse can do better.
    slope = schedule.weight(t.clamp(min=MIN_TIME)) * m.clamp(min=MIN_TIME)
    assert ((schedule.time_at(m) - t).abs() <= 1e-12 + 1e-15 / slope).all()
    m = torch.linspace(0, 1, 500, dtype=torch.float64)
    assert torch.allclose(schedule.mask_prob(schedule.time_at(m)), m, rtol=0, atol=1e-14)
    assert schedule.time_at(torch.tensor(0.5)).dtype == torch.float64


@every_schedule
def test_the_bound_does_not_depend_on_the_schedule(schedule):
    """The time estimator integrates in m, so that each schedule gives the very same number."""
    toy = make_toy()
    tokens = torch.tensor([[0, 1, 2, 3], [3, 3, 1, 0]])
    values = [
        nll_bound(toy.denoiser(), tokens, space=toy.space, schedule=s, estimator="time",
                  draws=50, seed=2).nats
        for s in (Linear(), schedule)
    ]  # fmt: skip
    assert torch.allclose(*values, rtol=1e-9)


@every_schedule
def test_the_weight_integrates_to_minus_log_m(schedule):
    """The integral of w from s to 1 is -ln m(s): closed form against quadrature."""
    edges = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    middle = (edges[1:] * edges[:-1]).sqrt()
    total = (schedule.weight(middle) * (edges[1:] - edges[:-1])).sum()
    assert float(total) == pytest.approx(-math.log(float(schedule.mask_prob(edges[0]))), rel=1e-5)


@pytest.mark.parametrize("options", [
    {"power": 0.0}, {"power": -1.0}, {"power": float("nan")}, {"power": float("inf")},
])  # fmt: skip
def test_a_parameter_out_of_range_is_refused(options):
    with pytest.raises(ConfigError):
        named_schedule("polynomial", **options)


def test_names_are_found_in_any_case_and_unknown_ones_get_the_nearest():
    assert named_schedule("Cosine") == Cosine()
    assert set(SCHEDULES) == {
        "linear",
        "cosine",
        "polynomial",
        "arccos",
        "exponential",
        "geometric",
    }
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        named_schedule("cosin")
    with pytest.raises(ConfigError, match="does not take"):
        named_schedule("linear", power=2)
    for hi in (1.0, 2.0):
        with pytest.raises(ConfigError, match="lo < hi"):
            Geometric(2.0, hi)


@pytest.mark.parametrize(("name", "options"), [
    ("exponential", {"rate": 40.0}), ("geometric", {"lo": 1e-5, "hi": 50.0}),
])  # fmt: skip
def test_a_schedule_without_an_inverse_at_1_is_refused(name, options):
    with pytest.raises(ConfigError, match="at most"):
        named_schedule(name, **options)
    for schedule in FORMS:
        assert 0.99 < float(schedule.time_at(1.0)) <= 1 + 1e-9


def test_the_steepest_schedules_are_taken():
    assert float(Exponential(STEEPEST).mask_prob(1.0)) == 1
    # The difference of both ends counts.
    assert float(Geometric(10.0, 10 + STEEPEST).mask_prob(1.0)) == 1
