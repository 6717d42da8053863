"""`Pipeline.revise_picture`: a finished picture whose tokens are taken back where it may change."""

from __future__ import annotations

import numpy as np
import pytest

import mdiff
from mdiff.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model():
    return mdiff.load("builtin:emoji")


@pytest.fixture(scope="module")
def face(model):
    (made,) = model.generate({"caption": "grinning face"}, sampler="halton", steps=8, seed=2)
    return made.image


@pytest.mark.parametrize(("sampler", "options"), [
    ("remdm", {"rounds": 4}), ("psi", {"rounds": 4, "strength": 0.6}), ("gibbs", {"sweeps": 0.2}),
    ("path_planning", {"rounds": 4, "strength": 0.4}),
])  # fmt: skip
def test_only_pixels_of_the_mask_change(model, face, sampler, options):
    before, (height, width) = np.array(face), model.modality.size
    mask = np.zeros((height, width), dtype=bool)
    mask[: height // 2] = True
    made = model.revise_picture(
        face, mask, given={"caption": "grinning face"}, sampler=sampler, num_samples=2, seed=4,
        **options,
    )  # fmt: skip
    assert len(made) == 2
    for sample in made:
        after = np.array(sample.image)
        assert (after[~mask] == before[~mask]).all()
        assert model.space.mask_id not in sample.tokens
        assert sample.calls > 0
    assert any((np.array(sample.image)[mask] != before[mask]).any() for sample in made)
    assert made[0].tokens != made[1].tokens


def test_a_revised_picture_starts_from_the_one_that_was_given(model, face):
    """Of 0.1 hidden at first most tokens stay, unlike those of an edit of the whole picture."""
    caption = {"caption": "grinning face"}
    ids = model.modality.canvas({"image": face, **caption})
    (little,) = model.revise_picture(face, given=caption, strength=0.1, rounds=3, eta=0.0)
    (edited,) = model.edit(face, given=caption, sampler="halton", steps=8)
    assert sum(a != b for a, b in zip(ids, little.tokens)) < 0.2 * len(ids)
    assert sum(a != b for a, b in zip(ids, edited.tokens)) > 0.2 * len(ids)


def test_models_of_text_and_wrong_masks_are_refused(model, face):
    with pytest.raises(ConfigError, match="not of pictures"):
        mdiff.load("builtin:shakespeare").revise_picture(face)
    with pytest.raises(DataError, match="mask"):
        model.revise_picture(face, np.ones((3, 3), dtype=bool))
    with pytest.raises(ConfigError, match="strength"):
        model.revise_picture(face, strength=0.0)
    with pytest.raises(ConfigError, match="takes no steps"):
        model.revise_picture(face, sampler="gibbs", rounds=3)
