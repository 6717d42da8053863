"""The scaling law: what was planted is found, and what cannot be identified is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import least_squares

from mdiff.errors import ConfigError, DataError
from mdiff.sweeps.scaling import DELTA, fit_scaling, unidentified

TRUE = {"E": 1.5, "A": 200.0, "a": 0.5, "B": 350.0, "b": 0.45}
NS, DS = (1e4, 3e4, 1e5, 3e5), (1e5, 3e5, 1e6, 3e6)


def law(n, d, true=TRUE):
    return true["E"] + true["A"] / n ** true["a"] + true["B"] / d ** true["b"]


def grid(ns=NS, ds=DS, seeds=1):
    pairs = [(n, d) for n in ns for d in ds for _ in range(seeds)]
    return np.array(pairs).T


def noisy(n, d, seed, spread=0.005):
    noise = np.random.default_rng(seed).standard_normal(len(n))
    return law(n, d) * np.exp(spread * noise)


def covered(seeds, **options):
    """How often each planted value lies in its interval."""
    hits = dict.fromkeys(TRUE, 0)
    n, d = grid()
    for seed in seeds:
        found = fit_scaling(n, d, noisy(n, d, seed), **options)
        for name, (low, high) in found.intervals.items():
            hits[name] += low <= TRUE[name] <= high
    return hits


def test_a_law_without_noise_is_found_to_seven_digits():
    n, d = grid()
    found = fit_scaling(n, d, law(n, d), bootstrap=20)
    assert found.values == pytest.approx(TRUE, rel=1e-7)
    for name, (low, high) in found.intervals.items():
        assert low == pytest.approx(TRUE[name], rel=1e-5) == high


def test_planted_values_lie_in_their_intervals():
    """Of fixed data: these four hold all five values."""
    assert set(covered(range(4), bootstrap=60).values()) == {4}


@pytest.mark.slow
def test_intervals_hold_planted_values_about_as_often_as_they_say():
    """Of 200 fits 190 are expected at 95 percent, and fewer than 174 with probability 1e-6."""
    hits = covered(range(1000, 1200), bootstrap=200)
    assert min(hits.values()) >= 174, hits


@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_is_that_of_scipy(seed):
    n, d = grid()
    y = np.log(noisy(n, d, seed))
    x, z = np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean()

    def residuals(p):
        return np.logaddexp.reduce([p[0] + 0 * x, p[1] - p[2] * x, p[3] - p[4] * z]) - y

    def cost(p):
        size = np.abs(residuals(p))
        return np.where(size < DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum()

    start = [math.log(1.4), -1.0, 0.4, -1.0, 0.4]
    theirs = least_squares(
        residuals, start, loss="huber", f_scale=DELTA, x_scale="jac", max_nfev=500
    )
    ours = fit_scaling(n, d, np.exp(y), bootstrap=2).values
    scale = [math.log(ours[k]) - ours[p] * np.log(v).mean() for k, p, v in ("Aan", "Bbd")
             for v in [n if v == "n" else d]]  # fmt: skip
    mine = cost([math.log(ours["E"]), scale[0], ours["a"], scale[1], ours["b"]])
    assert mine <= cost(theirs.x) * (1 + 1e-6)


def test_one_outlier_hardly_moves_the_fit():
    n, d = grid()
    losses = noisy(n, d, 0, spread=1e-4)
    plain = fit_scaling(n, d, losses, bootstrap=2).values
    losses[5] *= 1.2
    assert fit_scaling(n, d, losses, bootstrap=2).values["a"] == pytest.approx(plain["a"], rel=0.02)


def test_what_is_the_same_in_all_runs_is_a_part_of_e():
    n, d = grid(ds=(1e6,))
    found = fit_scaling(n, d, law(n, d), bootstrap=20)
    assert set(found.values) == set(found.intervals) == {"E", "A", "a"}
    assert found.values["E"] == pytest.approx(1.5 + 350 / 1e6**0.45, rel=1e-6)
    assert found.values["a"] == pytest.approx(0.5, rel=1e-5)
    n, d = grid(ns=(1e5,))
    assert set(fit_scaling(n, d, law(n, d), bootstrap=20).values) == {"E", "B", "b"}


def test_the_same_seed_gives_the_same_intervals():
    n, d = grid()
    losses = noisy(n, d, 1)
    one, two, other = (fit_scaling(n, d, losses, bootstrap=20, seed=s) for s in (0, 0, 1))
    assert one == two != other
    assert one.values == other.values


@pytest.mark.parametrize(
    ("n", "d", "why"),
    [
        ([1, 2, 3, 4], [1, 1, 1, 2], "D has 2 different values"),
        ([1, 2, 1, 2], [1, 1, 1, 1], "N has 2 different values"),
        ([1, 2, 3], [1, 1, 1], r"3 different points \(N, D\) for 3 unknowns"),
        ([1, 2, 3] * 4, [1, 1, 1] * 4, "3 different points"),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], "5 different points .* for 5 unknowns"),
    ],
)
def test_a_grid_that_cannot_identify_the_law_is_said_to(n, d, why):
    with pytest.raises(DataError, match=why):
        fit_scaling(n, d, [2.0] * len(n))


def test_a_grid_of_one_point_and_losses_without_a_logarithm_are_refused():
    with pytest.raises(ConfigError, match="neither N nor D changes"):
        fit_scaling([5, 5], [7, 7], [1.0, 2.0])
    assert unidentified(NS, [1e5] * 4) == ""
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match="above 0"):
            fit_scaling(NS, [1e5] * 4, [1.0, 2.0, 3.0, wrong])
