"""Behaviours that published samplers for images get wrong: each test names the right one."""

from __future__ import annotations

import pytest
import torch
from toys import HashDenoiser

from mdiff import sample
from mdiff.denoiser import from_logits, guided
from mdiff.filling import reveal_counts, schedule_counts
from mdiff.find import find, names
from mdiff.objective import masked_diffusion_loss, nll_bound
from mdiff.schedule import Arccos, Cosine, Linear
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(16, mask_id=16)
FEW_CALLS = {
    "ancestral": {"steps": 5}, "any_order": {"steps": 5}, "blocks": {"block_length": 16},
    "confidence": {"steps": 5, "noise": 4.5}, "first_hitting": {"per_call": 7},
    "halton": {"steps": 5},
}  # fmt: skip
every_sampler = pytest.mark.parametrize("name", names("samplers"))


class Fickle:
    """Other logits at every call, so that a token that is drawn again shows."""

    uses_time = False

    def __init__(self, vocab_size):
        self.generator = torch.Generator().manual_seed(5)
        self.vocab_size = vocab_size
        self.calls = 0

    def __call__(self, tokens, *, at=None, **rest):
        self.calls += 1
        logits = torch.randn(*tokens.shape, self.vocab_size, generator=self.generator) * 4
        return logits if at is None else logits[at]


def mixed_batch():
    """Rows of 36 places with none, few, most and all of them hidden."""
    generator = torch.Generator().manual_seed(8)
    canvas = torch.randint(0, 16, (5, 36), generator=generator)
    share = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])[:, None]
    return torch.where(torch.rand(5, 36, generator=generator) < share, 16, canvas)


def states_of(name, canvas, denoiser, *, space=SPACE, few=True, **options):
    options = {**(FEW_CALLS.get(name, {}) if few else {}), **options}
    return list(find("samplers", name)(denoiser, canvas, space=space, **options))


@every_sampler
def test_a_fully_known_canvas_comes_back_unchanged_and_without_a_call(name):
    denoiser = Fickle(16)
    known = torch.arange(36).expand(2, 36).contiguous() % 16
    for options in ({}, FEW_CALLS.get(name, {})):
        out = sample(denoiser, known, space=SPACE, sampler=name, **options)
        assert torch.equal(out.tokens, known)
        assert out.calls.tolist() == [0, 0]
        assert out.log_prob.tolist() == [0, 0]
    assert denoiser.calls == 0
    beside = sample(denoiser, mixed_batch(), space=SPACE, sampler=name)
    assert torch.equal(beside.tokens[0], mixed_batch()[0])
    assert int(beside.calls[0]) == 0


def test_counts_follow_each_samples_own_unknowns_and_not_their_mean():
    """56 and 256 unknown places in one batch have the tables that each has alone."""
    unknown = torch.tensor([56, 256])
    for schedule in (Cosine(), Arccos(), Linear()):
        both = schedule_counts(unknown, steps=12, schedule=schedule)
        for row, count in enumerate(unknown):
            alone = schedule_counts(count[None], steps=12, schedule=schedule)
            assert torch.equal(both[row], alone[0])
    done = reveal_counts("schedule", unknown, steps=12, schedule=Cosine()).cumsum(1)
    left = unknown[:, None] - done
    assert left[0, :4].tolist() == [55, 54, 51, 48]
    assert left[1, :4].tolist() == [253, 247, 236, 221]


@pytest.mark.parametrize("name", ["any_order", "confidence", "halton"])
def test_no_sample_is_counted_by_the_first_of_its_batch(name):
    canvas = mixed_batch()
    counts = torch.stack([
        state.revealed.sum(1)
        for state in states_of(name, canvas, HashDenoiser(SPACE), counts="schedule")
    ])  # fmt: skip
    for row in range(1, 5):
        alone = states_of(name, canvas[row : row + 1], HashDenoiser(SPACE), counts="schedule")
        own = [int(state.revealed.sum()) for state in alone]
        assert [int(n) for n in counts[:, row] if n] == own


@every_sampler
@pytest.mark.parametrize("few", [False, True])
def test_given_and_committed_tokens_are_never_drawn_again(name, few):
    canvas = mixed_batch()
    fixed = canvas != SPACE.mask_id
    before = canvas
    for state in states_of(name, canvas, Fickle(16), few=few, seed=4):
        assert torch.equal(state.tokens[fixed], before[fixed])
        assert not (state.revealed & fixed).any()
        fixed, before = fixed | state.revealed, state.tokens
    assert fixed.all()
    assert torch.equal(before[canvas != SPACE.mask_id], canvas[canvas != SPACE.mask_id])


def test_a_grid_of_64_by_64_is_filled_to_its_last_cell():
    flat = from_logits(lambda tokens: torch.zeros(*tokens.shape, 16))
    for options in ({"grid": (64, 64)}, {}, {"roll": True}):
        canvas = torch.full((1, 4096), SPACE.mask_id)
        out = sample(flat, canvas, space=SPACE, sampler="halton", steps=16, **options)
        assert (out.tokens != SPACE.mask_id).all()
        assert out.calls.tolist() == [16]


@every_sampler
@pytest.mark.parametrize("options", [
    {}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 1}, {"top_p": 0.1},
], ids=str)  # fmt: skip
def test_no_mask_is_left_and_none_is_drawn_where_the_head_prefers_it(name, options):
    """The head has a column for the mask id, and another for an id not to be generated."""
    space = TokenSpace(18, mask_id=16, never=(17,))
    table = torch.zeros(18)
    table[16:] = 40.0
    head = from_logits(lambda tokens: table.expand(*tokens.shape, 18))
    for few in (False, True):
        last = states_of(name, mixed_batch(), head, space=space, few=few, **options)[-1]
        assert (last.tokens < 16).all()


@every_sampler
def test_the_callers_canvas_and_conditions_are_never_changed_in_place(name):
    canvas, valid = mixed_batch(), torch.ones(5, 36, dtype=torch.bool)
    cond = {"label": torch.arange(5), "given": canvas != SPACE.mask_id}
    null = {"label": torch.tensor(0)}
    kept = [tensor.clone() for tensor in (canvas, valid, *cond.values(), *null.values())]
    pair = guided(
        HashDenoiser(SPACE), guidance_scale=2.0, without=null, hide="given", space=SPACE,
        guidance_schedule="interval", interval=(0.2, 0.9),
    )  # fmt: skip
    for _ in range(2):
        states_of(name, canvas, pair, valid=valid, cond=cond)
    for tensor, copy in zip((canvas, valid, *cond.values(), *null.values()), kept, strict=True):
        assert torch.equal(tensor, copy)


def test_training_and_scoring_leave_tokens_and_conditions_as_they_were():
    tokens, cond = torch.arange(72).view(2, 36) % 16, {"label": torch.tensor([1, 2])}
    kept = tokens.clone(), cond["label"].clone()
    denoiser = HashDenoiser(SPACE)
    masked_diffusion_loss(denoiser, tokens, space=SPACE, schedule=Linear(), cond=cond, seed=0)
    nll_bound(denoiser, tokens, space=SPACE, schedule=Linear(), cond=cond, seed=0, draws=2)
    assert torch.equal(tokens, kept[0])
    assert torch.equal(cond["label"], kept[1])


@pytest.mark.parametrize("score", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ties_go_to_the_first_place_and_the_count_is_kept(score, temperature):
    """Where all confidences tie, a threshold would reveal all of them or none."""
    flat = from_logits(lambda tokens: torch.zeros(*tokens.shape, 16))
    canvas = torch.full((2, 36), SPACE.mask_id)
    canvas[1, ::2] = 3
    table = reveal_counts("schedule", torch.tensor([36, 18]), steps=6, schedule=Cosine())
    states = states_of(
        "confidence", canvas, flat, counts=table, steps=6, noise=0.0, score=score,
        temperature=temperature,
    )  # fmt: skip
    assert torch.stack([state.revealed.sum(1) for state in states], 1).tolist() == table.tolist()
    hidden = canvas == SPACE.mask_id
    for state in states:
        first = state.revealed.long().argmax(1)
        assert first.tolist() == hidden.long().argmax(1).tolist()
        revealed = hidden & (hidden.cumsum(1) <= state.revealed.sum(1, keepdim=True))
        assert torch.equal(state.revealed, revealed)
        hidden = hidden & ~state.revealed
