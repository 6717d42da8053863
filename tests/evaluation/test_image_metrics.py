"""Figures of pictures against real ones: closed forms, copies, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from mdiff.errors import DataError
from mdiff.evaluation.image_metrics import (
    classifier_agreement,
    diversity,
    frechet,
    nearest,
    pixel_features,
)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def with_moments(rows, mean, covariance, *, seed):
    """Features (rows, D) whose sample mean and covariance are exactly those given."""
    x = torch.randn(rows, len(mean), generator=random(seed), dtype=torch.float64)
    x = x - x.mean(0)
    own = torch.linalg.cholesky(x.T @ x / (rows - 1))
    asked = torch.linalg.cholesky(covariance)
    return x @ torch.linalg.inv(own).T @ asked.T + mean


def positive(size, *, seed):
    root = torch.randn(size, size, generator=random(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def test_the_frechet_distance_of_gaussians_along_the_axes_is_the_closed_form():
    mean, other = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 0.5]], dtype=torch.float64)
    spread, wide = torch.tensor([[1.0, 4.0, 0.25], [9.0, 1.0, 0.25]], dtype=torch.float64)
    real = with_moments(50, mean, spread.diag(), seed=1)
    fake = with_moments(70, other, wide.diag(), seed=2)
    expected = (mean - other).square().sum() + (spread.sqrt() - wide.sqrt()).square().sum()
    assert frechet(real, fake) == pytest.approx(float(expected), rel=1e-9)


def test_the_frechet_distance_of_turned_gaussians_is_the_closed_form():
    real_cov, fake_cov = positive(6, seed=3), positive(6, seed=4)
    mean = torch.full((6,), 1000.0, dtype=torch.float64)
    real = with_moments(40, mean, real_cov, seed=5)
    fake = with_moments(60, mean + 0.5, fake_cov, seed=6)
    # tr (S_r S_f)^(1/2) by symmetric roots alone (Dowson & Landau 1982).
    root = square_root(real_cov)
    cross = square_root(root @ fake_cov @ root).trace()
    expected = 6 * 0.25 + real_cov.trace() + fake_cov.trace() - 2 * cross
    assert frechet(real, fake) == pytest.approx(float(expected), rel=1e-8)
    assert frechet(fake, real) == pytest.approx(float(expected), rel=1e-8)


def test_the_frechet_distance_of_a_set_to_itself_in_another_order_is_zero():
    real = torch.randn(200, 8, generator=random())
    assert frechet(real, real.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet(real, real + 3.0) == pytest.approx(8 * 9, rel=1e-6)


def test_a_frechet_distance_needs_two_rows_of_finite_features_of_one_space():
    good = torch.randn(10, 4, generator=random())
    for bad in (
        good[:1], good[:, 0], good.long(), good[:, :3], good.masked_fill(good > 1, torch.nan),
    ):  # fmt: skip
        with pytest.raises(DataError):
            frechet(good, bad)
        with pytest.raises(DataError):
            frechet(bad, good)


def test_classifier_agreement_is_the_share_of_samples_named_as_asked():
    logits = torch.eye(4)[[0, 1, 2, 2]]
    assert classifier_agreement(logits, torch.arange(4)) == 0.75
    for labels in (torch.arange(3), torch.arange(4) + 1, torch.arange(4).float()):
        with pytest.raises(DataError):
            classifier_agreement(logits, labels)
    with pytest.raises(DataError):
        classifier_agreement(logits[:0], torch.arange(0))


def pictures(count, *, seed=0, low=0, high=256):
    return torch.randint(low, high, (count, 1, 4, 4), generator=random(seed), dtype=torch.uint8)


def test_diversity_is_one_of_the_same_pictures_half_of_half_the_contrast_and_zero_of_one():
    real, labels = pictures(40, high=128), torch.arange(40) % 4
    asked = {"real_labels": labels, "fake_labels": labels}
    assert diversity(real, real, **asked) == pytest.approx(1)
    assert diversity(real * 2, real, **asked) == pytest.approx(0.5)
    assert diversity(real, real[:1].expand_as(real), **asked) == 0
    # The pictures of each class are all alike, however different the classes are.
    alike = real[:4].repeat(10, 1, 1, 1)
    assert diversity(real, alike, **asked) == 0


def test_diversity_looks_at_the_classes_of_the_samples_alone():
    real, labels = pictures(40), torch.arange(40) % 4
    chosen = labels < 2
    real[~chosen] //= 8
    found = diversity(real, real[chosen], real_labels=labels, fake_labels=labels[chosen])
    assert found == pytest.approx(1)


def test_diversity_refuses_a_class_without_a_pair_and_wrong_shapes():
    real, labels = pictures(8), torch.arange(8) % 2
    cases = (
        (real, real[:3], labels, labels[:3]),
        (real, real, labels, labels + 1),
        (real, real, labels, labels[:5]),
        (real, real[:, :, :2], labels, labels),
        (real, real.float(), labels, labels),
        (real[:1].expand_as(real), real, labels, labels),
    )
    for one, other, real_labels, fake_labels in cases:
        with pytest.raises(DataError):
            diversity(one, other, real_labels=real_labels, fake_labels=fake_labels)


def test_a_copy_is_at_distance_zero_and_a_test_set_at_its_own():
    train, test = pictures(600, seed=1), pictures(30, seed=2)
    found = nearest(train[5:9], train=train, test=test)
    assert found.samples == 0
    apart = (test[:, None].double() - train[None].double()).flatten(2).norm(dim=2) / 255
    assert found.test == pytest.approx(float(apart.amin(1).mean()), rel=1e-5)
    assert nearest(test, train=train, test=test).samples == found.test


def test_distances_are_of_values_from_zero_to_one():
    black, white = torch.zeros(3, 1, 5, 5, dtype=torch.uint8), torch.full((2, 1, 5, 5), 255)
    assert nearest(black, train=white.to(torch.uint8), test=black).samples == math.sqrt(25)
    assert torch.equal(pixel_features(white.to(torch.uint8)), torch.ones(2, 25))
    for bad in (white, black[0], black[:0]):
        with pytest.raises(DataError):
            pixel_features(bad)
    with pytest.raises(DataError):
        nearest(black, train=black[:, :, :4], test=black)


def test_pixel_features_are_means_over_squares():
    checks = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    checks[:, :, ::2] = 255
    assert torch.equal(pixel_features(checks), torch.full((1, 3 * 64), 0.5))
