"""Samplers of noise that writes random tokens, against the enumerated law of their chain."""

import pytest
import torch
from noisy_toys import CLEAN, LENGTH, MASK, P_CLEAN, PROCESSES, TOY, IdealDenoiser, chain_law
from revising_toys import FALSE_ALARM, agrees
from toys import HashDenoiser

from mdiff import ConfigError, TokenSpace, from_logits, sample
from mdiff.process import Logistic, Mixed, Uniform
from mdiff.samplers.ancestral import ancestral
from mdiff.sampling import even_times

STEPS = 4
NOISY = [name for name in PROCESSES if name != "masking"]


def law_of(process, kappa=1.0, steps=STEPS):
    levels = process.schedule.mask_prob(even_times(steps))
    law = chain_law(process, levels, kappa)
    return dict(zip(map(tuple, CLEAN.tolist()), law.tolist()))


@pytest.fixture(params=[30_000, pytest.param(200_000, marks=pytest.mark.slow)], ids=str)
def masks(request):
    return torch.full((request.param, LENGTH), MASK)


@pytest.mark.parametrize("predicts", ["leave_one_out", "posterior"])
@pytest.mark.parametrize("name", NOISY)
def test_ancestral_has_the_law_of_its_chain(masks, name, predicts):
    process = PROCESSES[name]
    found = sample(
        IdealDenoiser(process, predicts), masks, space=TOY.space, sampler="ancestral",
        process=process, steps=STEPS, seed=3,
    )  # fmt: skip
    assert agrees(found.tokens, law_of(process)) > FALSE_ALARM
    assert found.calls.unique().tolist() == [STEPS]


@pytest.mark.parametrize("kappa", [0.0, 0.6])
@pytest.mark.parametrize("name", NOISY)
def test_psi_has_the_law_of_its_chain(masks, name, kappa):
    process = PROCESSES[name]
    found = sample(
        IdealDenoiser(process, "leave_one_out"), masks, space=TOY.space, sampler="psi",
        process=process, steps=STEPS, kappa=kappa, seed=4,
    )  # fmt: skip
    assert agrees(found.tokens, law_of(process, kappa)) > FALSE_ALARM


@pytest.mark.parametrize("name", NOISY)
def test_the_wrong_reading_of_a_prediction_is_another_law(name):
    process, masks = PROCESSES[name], torch.full((20_000, LENGTH), MASK)
    for truth, said in (("posterior", "leave_one_out"), ("leave_one_out", "posterior")):
        found = sample(
            IdealDenoiser(process, truth, said), masks, space=TOY.space, sampler="ancestral",
            process=process, steps=STEPS, seed=3,
        )  # fmt: skip
        assert agrees(found.tokens, law_of(process)) < FALSE_ALARM


@pytest.mark.parametrize("name", NOISY)
def test_more_steps_come_nearer_to_the_data_as_one_over_their_number(name):
    truth = dict(zip(map(tuple, CLEAN.tolist()), P_CLEAN.tolist()))
    far = {
        steps: sum(abs(p - truth[x]) for x, p in law_of(PROCESSES[name], steps=steps).items()) / 2
        for steps in (8, 32, 128)
    }
    assert far[32] < far[8] / 2.5
    assert far[128] < far[32] / 2.5
    assert far[128] < 0.02


def test_given_tokens_stay_and_a_full_canvas_is_revised():
    process = Uniform()
    model = IdealDenoiser(process, "leave_one_out")
    canvas = torch.tensor([[0, MASK, 2], [1, 1, 1]]).repeat(200, 1)
    given = torch.tensor([[True, False, False], [False, True, False]]).repeat(200, 1)
    found = sample(
        model, canvas, space=TOY.space, sampler="psi", process=process, steps=6, seed=1,
        given=given, start=0.8,
    )  # fmt: skip
    assert torch.equal(found.tokens[given], canvas[given])
    assert not bool((found.tokens == MASK).any())
    assert not torch.equal(found.tokens[1::2], canvas[1::2])


def test_a_sample_does_not_depend_on_its_batch_or_padding():
    space = TokenSpace(7, mask_id=7)
    model = HashDenoiser(space)
    model.predicts = "leave_one_out"
    canvas = torch.full((3, 6), 7)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 5 + [False]])
    for process in (Uniform(), Mixed(p_uniform=0.4), Logistic()):
        rest = {"space": space, "sampler": "psi", "process": process, "kappa": 0.5, "steps": 5}
        seeds = torch.tensor([5, 6, 7])
        every = sample(model, canvas, valid=valid, seed=seeds, **rest)
        for row, length in enumerate((6, 4, 5)):
            alone = sample(model, canvas[row : row + 1, :length], seed=seeds[row : row + 1], **rest)
            assert torch.equal(alone.tokens[0], every.tokens[row, :length])


def test_states_say_what_was_written_and_written_over():
    process = Uniform()
    model = IdealDenoiser(process, "leave_one_out")
    before = torch.full((50, LENGTH), MASK)
    for state in ancestral(model, before, space=TOY.space, process=process, steps=5):
        changed = state.tokens != before
        assert not bool((changed & ~state.revealed & ~state.rewritten & (before != MASK)).any())
        assert not bool(state.hidden_again.any())
        assert not bool((state.rewritten & (before == MASK)).any())
        before = state.tokens


@pytest.mark.parametrize("predicts", ["leave_one_out", "posterior"])
@pytest.mark.parametrize("process", [Mixed(p_uniform=0.0), Logistic(shift=-1e6)], ids=str)
def test_without_random_tokens_a_written_token_stays_as_it_is(process, predicts):
    """Also where the model would now draw another one, or finds that one impossible."""
    space = TokenSpace(50, mask_id=50)
    model = HashDenoiser(space)
    model.predicts = predicts
    canvas = torch.full((20, 12), 50)
    for top_k in (None, 2):
        before = canvas
        for state in ancestral(model, canvas, space=space, process=process, steps=9, top_k=top_k):
            assert torch.equal(state.tokens[before != 50], before[before != 50])
            before = state.tokens
        assert not bool((before == 50).any())


def test_parts_are_written_over_by_their_own_ids():
    space = TokenSpace(8, mask_id=8, never=(3,), parts=((2, 0, 4), (3, 4, 8)))
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 8))
    model.predicts = "leave_one_out"
    canvas = torch.full((4000, 5), 8)
    states = list(ancestral(model, canvas, space=space, process=Uniform(), steps=2))
    for tokens in (states[0].tokens, states[-1].tokens):
        assert sorted(tokens[:, :2].unique().tolist()) == [0, 1, 2]
        assert sorted(tokens[:, 2:].unique().tolist()) == [4, 5, 6, 7]


def test_a_denoiser_must_say_what_it_predicts():
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 3))
    canvas = torch.full((1, 4), 3)
    with pytest.raises(ConfigError, match="leave_one_out"):
        sample(model, canvas, space=TOY.space, sampler="ancestral", process=Uniform())


@pytest.mark.parametrize("process", [Uniform(), Logistic(scale=0.0)], ids=str)
def test_blocks_refuse_noise_that_does_not_end_in_masks(process):
    model = IdealDenoiser(process, "leave_one_out")
    options = {"sampler": "ancestral", "block_length": 2, "process": process}
    with pytest.raises(ConfigError, match="later blocks are shown as masks"):
        sample(model, torch.full((1, LENGTH), MASK), space=TOY.space, **options)


def test_blocks_sample_noise_that_ends_in_masks():
    for process in (Mixed(p_uniform=0.3), Logistic()):
        found = sample(
            IdealDenoiser(process, "leave_one_out"), torch.full((4, LENGTH), MASK),
            space=TOY.space, sampler="ancestral", block_length=2, process=process, steps=4,
        )  # fmt: skip
        assert not bool((found.tokens == MASK).any())


@pytest.mark.parametrize("value", [object(), Uniform, "uniform", 1, {"name": "uniform"}, []])
@pytest.mark.parametrize("name", ["ancestral", "psi"])
def test_what_is_no_process_is_refused(name, value):
    canvas = torch.full((1, LENGTH), MASK)
    with pytest.raises(ConfigError, match="process="):
        sample(IdealDenoiser(Uniform(), "posterior"), canvas, space=TOY.space, sampler=name,
               process=value)  # fmt: skip
