"""What every sampler keeps to."""

from __future__ import annotations

import inspect

import pytest
import torch
from sampler_runs import SPACE, VARIANTS, finish, mixed_canvas
from toys import HashDenoiser

from mdiff.errors import ConfigError, DataError
from mdiff.find import find, names
from mdiff.tokens import TokenSpace

SAMPLERS = [*names("samplers"), *VARIANTS]


OBLIVIOUS = ["ancestral", "any_order", "blocks", "first_hitting", "halton"]


REVISING = [
    "edit", "gibbs", "path_planning", "psi", "remdm", "first_hitting, corrector", "wino",
]  # fmt: skip
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
every_filling_sampler = pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in REVISING])
# Their rules look at the temperature or at the drawn token.
LOOKING = ("edit", "path_planning", "wino", "budget", "speculative", *VARIANTS)
# Of which a call never shows a sample twice.
every_sampler_of_one_canvas = pytest.mark.parametrize(
    "name", [n for n in SAMPLERS if n not in [*REVISING, "speculative"]]
)


@every_sampler
def test_given_tokens_are_never_changed_and_all_others_are_permitted(name):
    canvas = mixed_canvas()
    given = canvas != SPACE.mask_id
    for state in finish(name, canvas, seed=1):
        assert (state.tokens[given] == canvas[given]).all()
        assert not (state.revealed & given).any()
    new = state.tokens[~given]
    assert not torch.isin(new, torch.tensor(SPACE.forbidden)).any()
    assert ((new >= 0) & (new < 11)).all()


@every_filling_sampler
def test_a_revealed_token_stays_and_is_revealed_once(name):
    canvas = mixed_canvas()
    found = torch.zeros_like(canvas, dtype=torch.bool)
    before = canvas
    for state in finish(name, canvas, seed=2):
        assert not (found & state.revealed).any()
        assert (state.tokens[found] == before[found]).all()
        assert (state.log_prob[~state.revealed] == 0).all()
        assert (state.entropy[~state.revealed] == 0).all()
        found, before = found | state.revealed, state.tokens
    assert (found == (canvas == SPACE.mask_id)).all()


@every_sampler
def test_ids_outside_a_part_are_never_drawn(name):
    space = TokenSpace(11, mask_id=11, never=(3,), parts=((4, 2, 6), (3, 7, 11)))
    canvas = torch.full((5, 7), 11)
    if name == "blocks":
        with pytest.raises(ConfigError, match="parts"):
            finish(name, canvas, space=space)
        return
    tokens = finish(name, canvas, space=space, seed=3)[-1].tokens
    assert torch.isin(tokens[:, :4], torch.tensor([2, 4, 5])).all()
    assert ((tokens[:, 4:] >= 7) & (tokens[:, 4:] < 11)).all()


@every_sampler
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_does_not_depend_on_its_batch_or_its_padding(name, side):
    lengths = [3, 7, 12, 1, 9]
    seeds = torch.tensor([5, 6, 7, 8, 9])
    labels = torch.arange(5)
    canvas, valid = torch.zeros(5, 12, dtype=torch.int64), torch.zeros(5, 12, dtype=torch.bool)
    alone = []
    for row, length in enumerate(lengths):
        own = torch.full((1, length), SPACE.mask_id)
        own[0, : length // 3] = 1
        alone.append(
            finish(name, own, seed=seeds[row : row + 1], cond={"label": labels[row : row + 1]})[-1]
        )
        position = slice(0, length) if side == "right" else slice(12 - length, 12)
        canvas[row, position], valid[row, position] = own[0], True
    together = finish(name, canvas, seed=seeds, valid=valid, cond={"label": labels})[-1]
    for row, state in enumerate(alone):
        assert together.tokens[row][valid[row]].tolist() == state.tokens[0].tolist()
        assert together.calls[row] == state.calls[0]
        assert together.tokens[row][~valid[row]].eq(0).all()


@every_sampler
def test_an_int_seed_makes_row_b_sample_b_whatever_the_batch_size(name):
    canvas = torch.full((4, 6), SPACE.mask_id)
    whole = finish(name, canvas, seed=7)[-1].tokens
    assert (finish(name, canvas[:2], seed=7)[-1].tokens == whole[:2]).all()
    assert len({tuple(row) for row in whole.tolist()}) == 4
    assert (finish(name, canvas, seed=8)[-1].tokens != whole).any()


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in LOOKING])
def test_temperature_and_filters_do_not_change_how_many_tokens_a_step_writes(name):
    canvas = mixed_canvas()
    plain = [s.revealed.sum(1).tolist() for s in finish(name, canvas, seed=1)]
    for options in (
        {"temperature": 0.3},
        {"temperature": 0.0},
        {"top_k": 2},
        {"top_p": 0.5},
        {"min_p": 0.2},
    ):
        states = finish(name, canvas, seed=1, **options)
        assert [s.revealed.sum(1).tolist() for s in states] == plain


@pytest.mark.parametrize("name", OBLIVIOUS)
def test_oblivious_orders_do_not_look_at_the_logits(name):
    canvas = mixed_canvas()
    one = finish(name, canvas, seed=1, denoiser=HashDenoiser(SPACE, seed=1))
    two = finish(name, canvas, seed=1, denoiser=HashDenoiser(SPACE, seed=2))
    assert all((a.revealed == b.revealed).all() for a, b in zip(one, two, strict=True))
    assert (one[-1].tokens != two[-1].tokens).any()


@pytest.mark.parametrize("name", OBLIVIOUS)
def test_oblivious_orders_ask_for_the_revealed_rows_alone(name):
    denoiser = HashDenoiser(SPACE)
    canvas = mixed_canvas()
    finish(name, canvas, denoiser=denoiser, seed=1)
    assert denoiser.rows_asked == int((canvas == SPACE.mask_id).sum())


@every_sampler
def test_where_nothing_is_hidden_there_is_no_state_and_no_call(name):
    denoiser = HashDenoiser(SPACE)
    assert finish(name, torch.ones(2, 4, dtype=torch.int64), denoiser=denoiser) == []
    assert denoiser.calls == 0


@every_sampler_of_one_canvas
def test_calls_count_what_each_sample_needed(name):
    canvas = mixed_canvas()
    last = finish(name, canvas, seed=1)[-1]
    hidden = (canvas == SPACE.mask_id).sum(1)
    assert (last.calls <= hidden).all()
    assert (last.calls >= 1).all()


@every_sampler_of_one_canvas
def test_time_reaches_models_that_use_it_and_falls(name):
    class Timed(HashDenoiser):
        uses_time = True
        times: list[torch.Tensor]

        def __call__(self, tokens, *, t=None, **rest):
            assert t is not None
            assert t.shape == (len(tokens),)
            self.times.append(t)
            return super().__call__(tokens, **rest)

    denoiser = Timed(SPACE)
    denoiser.times = []
    states = finish(
        name,
        torch.full((1, 8), SPACE.mask_id),
        denoiser=denoiser,
        **({"block_length": 8} if name == "blocks" else {}),
    )
    times = torch.cat(denoiser.times)
    assert (times[1:] < times[:-1]).all()
    assert float(times[-1]) > 0
    assert float(times[0]) <= 1
    assert len(times) == len(states)


@every_sampler
def test_a_canvas_that_does_not_fit_the_space_is_refused(name):
    for canvas in (
        torch.full((2, 4), 11),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(2, 4),
        torch.full((1, 2), -1),
    ):
        with pytest.raises(DataError):
            finish(name, canvas)


def test_a_denoiser_with_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="11 ids"):
        finish("first_hitting", torch.full((1, 2), 5), denoiser=HashDenoiser(TokenSpace(7, 7)))


@pytest.mark.parametrize("name", names("samplers"))
def test_the_signature_is_the_one_of_the_room(name):
    parameters = inspect.signature(find("samplers", name)).parameters
    assert list(parameters)[:2] == ["denoiser", "canvas"]
    common = ["space", "schedule", "seed", "valid", "cond"]
    filters = ["temperature", "top_k", "top_p", "min_p"]
    assert list(parameters)[2:11] == common + filters
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in list(parameters.values())[2:])
