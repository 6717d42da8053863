"""Guidance and the token space at their borders."""

from __future__ import annotations

import pytest
import torch
from toys import HashDenoiser

from mdiff.denoiser import Denoiser, from_logits, guided
from mdiff.errors import ConfigError, DataError
from mdiff.tokens import TokenSpace, hidden_canvas, ranks

SPACE = TokenSpace(7, mask_id=2, never=(5,))
LABELS = {"label": torch.tensor([1, 2])}
CANVAS = torch.tensor([[0, 2, 1], [2, 2, 6]])


def test_guidance_is_one_convention():
    model = HashDenoiser(SPACE)
    without = {"label": torch.tensor(0)}
    conditional = model(CANVAS, cond=LABELS)
    unconditional = model(CANVAS, cond={"label": torch.zeros(2, dtype=torch.int64)})
    for scale in (0.0, 1.0, 2.5):
        expected = unconditional + scale * (conditional - unconditional)
        for option in ({"guidance_scale": scale}, {"cfg_scale": scale - 1}):
            model_with = guided(model, without=without, **option)
            assert torch.allclose(model_with(CANVAS, cond=LABELS), expected)
            at = torch.tensor([[False, True, False], [True, True, False]])
            assert torch.allclose(model_with(CANVAS, at=at, cond=LABELS), expected[at])


def test_guidance_runs_both_branches_in_one_call_and_one_branch_at_scale_1():
    for scale, rows, evaluations in ((1.0, 6, 1), (2.0, 12, 2)):
        model = HashDenoiser(SPACE)
        pair = guided(model, guidance_scale=scale, without={"label": torch.tensor(0)})
        pair(CANVAS, cond=LABELS)
        assert (model.calls, model.rows_seen, pair.evaluations) == (1, rows, evaluations)
        assert isinstance(pair, Denoiser)


def test_guidance_by_masking_hides_the_given_places_in_one_branch():
    model = HashDenoiser(SPACE)
    hide = torch.tensor([[True, False, False], [False, False, True]])
    pair = guided(model, guidance_scale=3.0, hide="given", space=SPACE)
    blank = torch.tensor([[2, 2, 1], [2, 2, 2]])
    expected = model(blank) + 3 * (model(CANVAS) - model(blank))
    assert torch.allclose(pair(CANVAS, cond={"given": hide}), expected)
    with pytest.raises(ConfigError, match="given"):
        pair(CANVAS)


@pytest.mark.parametrize("options", [
    {}, {"guidance_scale": 1.0, "cfg_scale": 1.0, "hide": "x"}, {"guidance_scale": 2.0},
    {"guidance_scale": float("nan"), "without": LABELS}, {"guidance_scale": 2.0, "hide": "x"},
])  # fmt: skip
def test_guidance_that_cannot_be_meant_is_refused(options):
    with pytest.raises(ConfigError):
        guided(HashDenoiser(SPACE), **options)


def test_from_logits_selects_rows_in_row_major_order():
    logits = torch.randn(2, 3, 7)
    at = torch.tensor([[True, False, True], [False, True, False]])
    assert torch.equal(from_logits(lambda _: logits)(CANVAS, at=at), logits[at])


def test_a_space_knows_its_forbidden_and_permitted_ids():
    assert SPACE.forbidden == (2, 5)
    assert SPACE.permitted == 5
    assert TokenSpace(7, mask_id=7).forbidden == ()
    spans = TokenSpace(7, 7, parts=((2, 0, 3), (1, 3, 7))).spans(3)
    assert spans.tolist() == [[0, 3], [0, 3], [3, 7]]


@pytest.mark.parametrize("arguments", [
    (0, 0), (3, 4), (3, -1), (3, 3, (3,)), (2, 0, (1,)), (3, 3, (), ((1, 2, 2),)),
    (3, 3, (), ((0, 0, 2),)), (3, 3, (1,), ((1, 1, 2),)),
])  # fmt: skip
def test_a_space_that_cannot_be_meant_is_refused(arguments):
    with pytest.raises(ConfigError):
        TokenSpace(*arguments)


def test_a_canvas_is_checked_against_its_parts_and_the_message_names_the_place():
    space = TokenSpace(7, 7, parts=((2, 0, 3), (1, 3, 7)))
    space.check(torch.tensor([[0, 7, 4]]))
    with pytest.raises(DataError, match="token 5 at place 1"):
        space.check(torch.tensor([[0, 5, 4]]))
    with pytest.raises(DataError, match="sum to 3"):
        space.check(torch.tensor([[0, 1]]))
    with pytest.raises(DataError, match="mask id"):
        space.check(torch.tensor([[0, 7, 4]]), masks=False)


def test_ranks_count_valid_tokens_only():
    valid = torch.tensor([[False, True, False, True], [True, True, True, False]])
    assert ranks(torch.zeros(2, 4), valid)[valid].tolist() == [0, 1, 0, 1, 2]
    assert hidden_canvas(1, 2, space=SPACE).tolist() == [[2, 2]]
    with pytest.raises(ConfigError):
        hidden_canvas(0, 2, space=SPACE)


def test_guidance_keeps_excluded_ids_excluded():
    table = torch.zeros(3, 7)
    table[:, 4] = -torch.inf

    def model(tokens, *, at=None, cond=None, **rest):
        return table[cond["label"]][:, None].expand(*tokens.shape, 7)

    model.uses_time = False
    pair = guided(model, guidance_scale=3.0, without={"label": torch.tensor(0)})
    out = pair(CANVAS, cond=LABELS)
    assert (out[..., 4] == -torch.inf).all()
    assert not out.isnan().any()


def test_guidance_without_a_condition_that_is_not_there_is_refused():
    pair = guided(HashDenoiser(SPACE), guidance_scale=3.0, without={"lable": torch.tensor(0)})
    with pytest.raises(ConfigError, match="label"):
        pair(CANVAS, cond=LABELS)
