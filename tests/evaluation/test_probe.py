"""Probes of features: separable ones, units, chance, and shapes that do not fit."""

from __future__ import annotations

import pytest
import torch

from mdiff.errors import DataError
from mdiff.evaluation.probe import probe


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_probes_tell_separable_features_apart():
    labels = torch.arange(300) % 3
    centres = 6 * torch.randn(3, 10, generator=random(1))
    found = centres[labels] + torch.randn(300, 10, generator=random(2))
    result = probe(found[:200], labels[:200], found[200:], labels[200:])
    assert result.linear == 1.0
    assert result.neighbours == 1.0


def test_probes_do_not_depend_on_the_units_of_the_features():
    labels = torch.arange(300) % 3
    centres = 2 * torch.randn(3, 5, generator=random(1))
    found = centres[labels] + torch.randn(300, 5, generator=random(2))
    scaled = found * torch.tensor([1.0, 1000.0, 0.01, 1.0, 30.0]) + 5
    one = probe(found[:200], labels[:200], found[200:], labels[200:])
    assert probe(scaled[:200], labels[:200], scaled[200:], labels[200:]) == one


def test_probes_of_noise_are_at_chance():
    """Labels are coins: of 1,000 guesses Binomial(1/2) are right; 5.2 deviations are allowed.

    False alarm 2e-7 a figure, 4e-7 in all.
    """
    labels = torch.randint(0, 2, (2000,), generator=random(1))
    noise = torch.randn(2000, 8, generator=random(2))
    result = probe(noise[:1000], labels[:1000], noise[1000:], labels[1000:])
    bound = 5.2 * 0.5 / 1000**0.5
    assert abs(result.linear - 0.5) < bound
    assert abs(result.neighbours - 0.5) < bound


def test_probes_refuse_shapes_that_do_not_fit():
    found, labels = torch.randn(20, 4, generator=random()), torch.arange(20) % 2
    for bad in (
        (found, labels[:5], found, labels), (found, labels, found[:, :3], labels),
        (found, labels, found[:0], labels[:0]), (found[:, 0], labels, found, labels),
        (found, labels * 0, found, labels),
    ):  # fmt: skip
        with pytest.raises(DataError):
            probe(*bad)
