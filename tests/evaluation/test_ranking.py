"""Candidates are ranked by what the model says of them, with common masks."""

from __future__ import annotations

import pytest
import torch

from mdiff.denoiser import from_logits
from mdiff.errors import ConfigError
from mdiff.evaluation.ranking import rank
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.modality import image
from mdiff.pipeline.pipeline import Pipeline

NAMES = ["dark", "dim", "pale", "white"]


def pipeline():
    """A model that names a picture of one pixel by its grey; "dark" is likely a priori."""
    made = image(codec=levels(levels=4, step=60), size=(1, 1), label="part", labels=NAMES)

    def logits(tokens):
        found = torch.zeros(*tokens.shape, 8)
        found[:, 1, 4] = 2.0
        known = tokens[:, 0] < 4
        found[known, 1] = 0.0
        found[known, 1, 4] = 2.0
        found[known, 1, 4 + tokens[known, 0]] += 1.0
        return found

    return Pipeline(from_logits(logits), made.space, made, window=2)


def grey(level):
    return torch.full((1, 1), 60 * level, dtype=torch.uint8)


def test_against_the_prior_the_right_name_wins_though_another_is_commoner():
    pipe = pipeline()
    for level in range(4):
        score = rank(pipe, {"image": grey(level)}, NAMES, part="label", draws=4)
        assert int(score.argmax()) == level
    plain = rank(pipe, {"image": grey(2)}, NAMES, part="label", draws=4, against_prior=False)
    assert int(plain.argmax()) == 0


def test_scores_are_log_probabilities_of_the_part_alone():
    score = rank(pipeline(), {"image": grey(2)}, NAMES, part="label", draws=4, against_prior=False)
    expected = torch.tensor([2.0, 0.0, 1.0, 0.0]).double().log_softmax(0)
    assert torch.allclose(score, expected, atol=1e-6)


def test_what_cannot_be_ranked_is_refused():
    pipe = pipeline()
    with pytest.raises(ConfigError, match="has no caption"):
        rank(pipe, {"image": grey(0)}, NAMES, part="caption")
    with pytest.raises(ConfigError, match="is given"):
        rank(pipe, {"label": "dim"}, NAMES, part="label")
    with pytest.raises(ConfigError, match="at least 1"):
        rank(pipe, {}, [], part="label")
