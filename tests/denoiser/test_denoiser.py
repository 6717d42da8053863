"""Guidance and the token space at their borders."""

from __future__ import annotations

import pytest
import torch
from toys import HashDenoiser

from mdiff import sample
from mdiff.denoiser import Denoiser, from_logits, guided
from mdiff.errors import ConfigError, DataError
from mdiff.find import find, names
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
        assert (model.calls, model.rows_asked, pair.evaluations) == (1, rows, evaluations)
        assert isinstance(pair, Denoiser)


def test_guidance_by_masking_hides_the_given_positions_in_one_branch():
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


def test_a_canvas_is_checked_against_its_parts_and_the_message_names_the_position():
    space = TokenSpace(7, 7, parts=((2, 0, 3), (1, 3, 7)))
    space.check(torch.tensor([[0, 7, 4]]))
    with pytest.raises(DataError, match="token 5 at position 1"):
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


HALF = torch.tensor([[2, 2, 2, 2], [2, 2, 2, 0], [2, 1, 0, 2], [6, 1, 3, 0]])
FOUR = {"label": torch.tensor([1, 2, 3, 4])}
NULL = {"label": torch.tensor(0)}
SCALES = {  # of rows whose share hidden is 1, 3/4, 1/2, 0, at guidance_scale 3
    "constant": ({}, [3, 3, 3, 3]),
    "linear": ({}, [1, 1.5, 2, 3]),
    "cosine": ({}, [1, 2 - 0.5**0.5, 2, 3]),
    "interval": ({"interval": (0.5, 0.75)}, [1, 3, 1, 1]),
    "function": ({"guidance_schedule": lambda share: share**2}, [3, 2.125, 1.5, 1]),
}


def scheduled(model, name, **options):
    return guided(
        model, guidance_scale=3.0, without=NULL, space=SPACE,
        **{"guidance_schedule": name, **SCALES[name][0], **options},
    )  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_a_scheduled_scale_is_each_rows_own_by_its_hidden_share(name):
    model = HashDenoiser(SPACE)
    scale = torch.tensor(SCALES[name][1])
    pair = scheduled(model, name)
    assert torch.allclose(pair.strength.of_rows(HALF, None), scale.double())
    wide = torch.nn.functional.pad(HALF, (0, 3), value=SPACE.mask_id)
    valid = torch.arange(7).expand(4, 7) < 4
    assert torch.equal(pair.strength.of_rows(wide, valid), pair.strength.of_rows(HALF, None))
    c, u = model(HALF, cond=FOUR), model(HALF, cond={"label": torch.zeros(4, dtype=torch.int64)})
    expected = u + scale[:, None, None] * (c - u)
    assert torch.allclose(pair(HALF, cond=FOUR), expected, atol=1e-5)
    hidden = torch.isin(HALF, torch.tensor(SPACE.mask_id))
    for at in (hidden, ~hidden, torch.ones_like(hidden)):
        assert torch.allclose(pair(HALF, at=at, cond=FOUR), expected[at], atol=1e-5)


class Rows(HashDenoiser):
    """Counts the rows that it evaluates, over all calls."""

    def __init__(self, space, **options):
        super().__init__(space, **options)
        self.rows = 0

    def __call__(self, tokens, **options):
        self.rows += len(tokens)
        return super().__call__(tokens, **options)


@pytest.mark.parametrize("name", SCALES)
def test_a_row_at_scale_1_runs_through_one_branch_and_says_so(name):
    model = Rows(SPACE)
    pair = scheduled(model, name)
    needed = 1 + (torch.tensor(SCALES[name][1]) != 1).long()
    assert pair.row_evaluations(HALF, cond=FOUR).tolist() == needed.tolist()
    pair(HALF, cond=FOUR)
    assert (model.calls, model.rows) == (1, int(needed.sum()))
    if name != "constant":
        model.rows = 0
        alone = scheduled(model, "interval", interval=(0.8, 0.9))
        assert torch.equal(alone(HALF, cond=FOUR), HashDenoiser(SPACE)(HALF, cond=FOUR))
        assert model.rows == 4


@pytest.mark.parametrize("sampler", names("samplers"))
@pytest.mark.parametrize("name", SCALES)
def test_calls_are_the_branches_that_ran_and_a_samples_own(sampler, name):
    canvas = torch.full((4, 9), SPACE.mask_id)
    canvas[1, :4] = 1
    canvas[2, ::2] = 6
    canvas[3, :] = 0
    labels, seeds = torch.tensor([1, 2, 3, 4]), torch.tensor([3, 1, 4, 1])
    model = Rows(SPACE)

    def run(rows):
        return sample(
            scheduled(model, name), canvas[rows], space=SPACE, sampler=sampler,
            seed=seeds[rows], cond={"label": labels[rows]},
        )  # fmt: skip

    together = run(slice(None))
    assert int(together.calls.sum()) == model.rows
    assert int(together.calls[3]) == 0
    for row in range(4):
        alone = run(slice(row, row + 1))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert int(alone.calls) == int(together.calls[row])


# The rules of the others look at the logits, or at what is drawn.
BLIND = sorted(set(names("samplers")) - {"budget", "edit", "path_planning", "speculative", "wino"})


@pytest.mark.parametrize("sampler", BLIND)
def test_guidance_temperature_and_filters_do_not_change_how_many_tokens_a_step_writes(sampler):
    canvas = torch.full((3, 10), SPACE.mask_id)
    canvas[1, 3:8] = 1
    options = {} if sampler in ("first_hitting", "gibbs") else {"steps": 4}
    if sampler == "blocks":
        options["inner"] = find("samplers", "confidence")

    def written(model, **extra):
        states = find("samplers", sampler)(
            model, canvas, space=SPACE, seed=2, cond={"label": torch.tensor([1, 2, 3])},
            **options, **extra,
        )  # fmt: skip
        return [state.revealed.sum(1).tolist() for state in states]

    plain = written(HashDenoiser(SPACE))
    for name in SCALES:
        assert written(scheduled(HashDenoiser(SPACE), name)) == plain
        warm = {"temperature": 0.4, "top_k": 3, "top_p": 0.8, "min_p": 0.05}
        assert written(scheduled(HashDenoiser(SPACE), name), **warm) == plain


@pytest.mark.parametrize("options", [
    {"guidance_schedule": "liner"}, {"guidance_schedule": "linear", "space": None},
    {"guidance_schedule": "interval"}, {"guidance_schedule": "linear", "interval": (0.0, 0.5)},
    {"guidance_schedule": "interval", "interval": (0.5, 0.5)},
    {"guidance_schedule": "interval", "interval": (-0.1, 0.5)},
    {"guidance_schedule": "interval", "interval": (0.5, float("nan"))},
    {"guidance_schedule": "interval", "interval": (0.5,)},
], ids=str)  # fmt: skip
def test_a_guidance_schedule_that_cannot_be_meant_is_refused(options):
    with pytest.raises(ConfigError, match=r"guid|interval"):
        guided(HashDenoiser(SPACE), guidance_scale=2.0, without=NULL, **{"space": SPACE, **options})


def test_guidance_by_masking_takes_a_schedule_too():
    """The share is of the canvas as it is, not of the branch whose given positions are masked."""
    model = HashDenoiser(SPACE)
    hide = torch.tensor([[True, False, False], [False, False, True]])
    pair = guided(model, guidance_scale=3.0, hide="given", space=SPACE, guidance_schedule="linear")
    assert torch.allclose(
        pair.strength.of_rows(CANVAS, None), torch.tensor([7 / 3, 5 / 3]).double()
    )
    blank = torch.tensor([[2, 2, 1], [2, 2, 2]])
    scale = torch.tensor([7 / 3, 5 / 3])[:, None, None]
    expected = model(blank) + scale * (model(CANVAS) - model(blank))
    assert torch.allclose(pair(CANVAS, cond={"given": hide}), expected, atol=1e-5)
    whole = torch.full((2, 3), SPACE.mask_id)
    out = sample(pair, whole, space=SPACE, cond={"given": hide}, sampler="halton")
    assert out.calls.tolist() == [5, 5]
