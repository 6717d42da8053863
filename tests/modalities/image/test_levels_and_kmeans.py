"""Codecs of levels and of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_pictures import toy_pictures

from mdiff.errors import ConfigError, DataError
from mdiff.modalities.image.codecs.kmeans import (
    EXACT_IN_FLOAT32,
    kmeans,
    nearest_centre,
    patches,
    settle,
)
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.data.images import read_pictures
from mdiff.modalities.image.data.readers import DIGITS


@pytest.mark.parametrize("options", [{}, {"levels": 17, "step": 15}])
def test_the_seventeen_greys_of_digits_are_seventeen_ids(options: dict[str, int]) -> None:
    images = read_pictures(DIGITS, channels=1).pixels
    codec = levels(**options).fit(images)
    assert codec.codebook_size == 17
    ids = codec.encode(images)
    assert torch.equal(ids, (images[:, 0] // 15).long())
    assert torch.equal(codec.decode(ids), images)


def test_an_unknown_pixel_value_is_refused_with_the_nearest() -> None:
    images = torch.tensor([0, 15, 100, 240], dtype=torch.uint8).view(1, 1, 2, 2)
    with pytest.raises(DataError, match=r"pixel value 100: .*17 values.*the nearest is 105"):
        levels(levels=17, step=15).encode(images)
    with pytest.raises(DataError, match="the nearest is 105"):
        levels(levels=17, step=15).fit(images)


def test_without_fitting_all_256_values_are_ids_in_channels_side_by_side() -> None:
    images = torch.arange(256 * 3).view(1, 3, 16, 16).remainder(256).to(torch.uint8)
    codec = levels(channels=3)
    assert torch.equal(codec.encode(images)[0], images[0].permute(1, 2, 0).long())
    assert torch.equal(codec.decode(codec.encode(images)), images)


@given(
    dims=st.sampled_from([1, 12, 48, EXACT_IN_FLOAT32, EXACT_IN_FLOAT32 + 1, 768]),
    seed=st.integers(0, 2**20),
    extreme=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_distances_are_exact_whole_numbers(dims: int, seed: int, extreme: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    draw: Callable[..., Tensor] = lambda n: torch.randint(  # noqa: E731
        0, 256, (n, dims), generator=random, dtype=torch.uint8
    )
    points, centres = draw(30), draw(7)
    if extreme:
        points, centres = (points > 127).byte() * 255, (centres > 127).byte() * 255
    ids, far = nearest_centre(points, centres)
    true = (points.long()[:, None] - centres.long()[None]).square().sum(2)
    assert torch.equal(far.long(), true.min(1).values)
    assert torch.equal(ids, true.argmin(1))


def test_kmeans_of_as_many_patches_as_centres_loses_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    book = torch.randint(0, 256, (20, 3, 4, 4), generator=random, dtype=torch.uint8)
    chosen = torch.randint(0, 20, (50, 4, 4), generator=random)
    chosen[0].view(-1)[:] = torch.arange(16)
    chosen[1].view(-1)[:4] = torch.arange(16, 20)
    codec = kmeans(codebook_size=20)
    codec.codebook = book
    images = codec.decode(chosen)
    assert torch.equal(patches(images, 4)[7, 2, 3], book[chosen[7, 2, 3]].flatten())
    learnt = kmeans(codebook_size=20).fit(images)
    assert torch.equal(learnt.decode(learnt.encode(images)), images)
    with pytest.raises(DataError, match="20 different patches: codebook_size=21"):
        kmeans(codebook_size=21).fit(images)


def test_kmeans_is_a_function_of_its_seed_and_wastes_no_centre() -> None:
    images = toy_pictures(60, 3)
    first, again, other = (kmeans(codebook_size=64).fit(images, seed=s) for s in (5, 5, 6))
    assert first.codebook is not None
    assert other.codebook is not None
    assert torch.equal(first.codebook, again.codebook)
    assert not torch.equal(first.codebook, other.codebook)
    assert first.encode(images).unique().numel() == 64


def test_kmeans_is_better_than_patches_drawn_at_random() -> None:
    images = toy_pictures(200, 1)
    held_out = toy_pictures(50, 1)
    learnt = kmeans(channels=1, codebook_size=64).fit(images)
    random = kmeans(channels=1, codebook_size=64)
    number = torch.randperm(200 * 16, generator=torch.Generator().manual_seed(0))[:64]
    random.codebook = patches(images, 4).flatten(0, 2)[number].view(64, 1, 4, 4)

    def error(codec: Any) -> float:
        return float((codec.decode(codec.encode(held_out)).float() - held_out).square().mean())

    assert error(learnt) < 0.8 * error(random)


def test_dead_centres_are_set_again_and_the_others_become_the_means_of_their_points() -> None:
    points = torch.tensor([[0], [2], [100], [200]], dtype=torch.uint8)
    times = torch.tensor([1, 3, 1, 1])
    centres = torch.tensor([[0], [255], [255]], dtype=torch.uint8)
    alive, revived = settle(centres, points, times)
    # 0 once and 2 three times have the mean 1.5, which rounds to the even 2.
    assert sorted(alive[:, 0].tolist()) == [2, 100, 200]
    assert revived == 1


def test_an_unfitted_kmeans_says_so() -> None:
    with pytest.raises(ConfigError, match="no centres yet"):
        kmeans().encode(toy_pictures(1, 3))
