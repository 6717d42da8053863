"""Speculative: coupled, the tokens of `any_order`; by ratio, its law in still fewer rounds."""

from __future__ import annotations

import itertools

import pytest
import torch
from speculative_runs import Timed, both, ragged
from toys import HashDenoiser, make_toy

from mdiff.denoiser import guided
from mdiff.errors import CheckpointError, ConfigError
from mdiff.pipeline import load
from mdiff.samplers.speculative import speculative
from mdiff.sampling import sample
from mdiff.schedule import Cosine
from mdiff.tokens import TokenSpace, hidden_canvas

ORDERS = ("left_to_right", "right_to_left", "random")
DRAWS = (
    {}, {"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.5}, {"top_k": 2},
    {"top_p": 0.8}, {"min_p": 0.3, "temperature": 0.8},
)  # fmt: skip


def test_tokens_and_figures_are_those_of_any_order_draw_for_draw():
    saved = 0
    for toy, (vocab, length) in enumerate([(2, 5), (3, 4), (2, 1), (11, 9)]):
        space = TokenSpace(vocab, mask_id=vocab)
        canvas, rest = ragged(space, 12, length)
        for case, draw in enumerate(DRAWS):
            kind = Timed if case % 2 else HashDenoiser
            denoiser = kind(space, seed=toy)
            denoiser.table *= 1 + 2 * (case % 3)
            permutation = torch.rand(12, length).argsort(1)
            orders = (*ORDERS, permutation)
            for order, drafts in ((orders[case % 4], 1 + case), (orders[(case + 2) % 4], 3)):
                expected, found = both(
                    denoiser, canvas, space=space, drafts=drafts, order=order, seed=toy + case,
                    schedule=Cosine(), **draw, **rest,
                )  # fmt: skip
                saved += int((expected.rounds - found.rounds).sum())
    assert saved > 100


@pytest.mark.slow
def test_tokens_are_those_of_any_order_on_many_ideal_toys():
    for seed in range(120):
        toy = make_toy(2 + seed % 3, 1 + seed % 5 if seed % 3 < 2 else 4, seed=seed,
                       sharpness=1 + seed % 4)  # fmt: skip
        canvas = torch.full((64, toy.length), toy.vocab)
        for number, (order, draw) in enumerate(itertools.product(ORDERS, DRAWS)):
            both(toy.denoiser(), canvas, space=toy.space, drafts=1 + (number + seed) % 6,
                 order=order, seed=torch.arange(64) + 1000 * seed, **draw)  # fmt: skip


def test_the_law_is_that_of_any_order_with_its_random_numbers_integrated_out():
    """Over two ids a draw is token 1 where a logistic variable Z is below the logit of its context.

    So a position's draws in all contexts of an order depend on the interval of Z between these
    logits, a finite number; all draws are enumerated, each run by one row of a batch.
    """
    length, base = 4, 3 ** torch.arange(3, -1, -1)
    generator = torch.Generator().manual_seed(1)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        logit = 3 * torch.randn(3**length, length, generator=generator, dtype=torch.float64)
        intervals, chances = [], []
        for turn, position in enumerate(order):
            shown = [
                [v if order.index(i) < n else 2 for i, v in enumerate(values)]
                for n in range(turn + 1) for values in itertools.product((0, 1), repeat=length)
            ]  # fmt: skip
            numbers = (torch.tensor(shown) * base).sum(1).unique()
            ends = torch.tensor([-torch.inf, *logit[numbers, position].sort().values, torch.inf])
            ends = ends.double()
            chances.append((torch.sigmoid(ends[1:]) - torch.sigmoid(ends[:-1])).tolist())
            inner = ends.clamp(-50, 50)
            intervals.append(((inner[1:] + inner[:-1]) / 2).tolist())
        z = torch.tensor(list(itertools.product(*intervals)), dtype=torch.float64)
        z = z[:, torch.tensor(order).argsort()]
        chance = torch.tensor(list(itertools.product(*chances)), dtype=torch.float64).prod(1)

        class Fixed:
            """The denoiser of which each row has its own Z, so that a greedy draw is the draw."""

            uses_time = False

            def __call__(self, tokens, *, at=None, valid=None, cond=None, **_):
                one = logit[(tokens * base).sum(1)] > cond["z"]  # noqa: B023
                return torch.nn.functional.one_hot(one.long(), 2).double()[at]

        law = torch.zeros(2**length, dtype=torch.float64)
        for number, values in enumerate(itertools.product((0, 1), repeat=length)):
            canvas, law[number] = torch.full((length,), 2), 1
            for position in order:
                p = torch.sigmoid(logit[(canvas * base).sum(), position])
                law[number] *= p if values[position] else 1 - p
                canvas[position] = values[position]
        space, canvas = TokenSpace(2, mask_id=2), torch.full((len(z), length), 2)
        for drafts in (1, 2, 3):
            run = sample(
                Fixed(), canvas, space=space, sampler="speculative", order=torch.tensor(order),
                drafts=drafts, temperature=0.0, cond={"z": z},
            )  # fmt: skip
            made = torch.zeros_like(law).index_add(
                0, (run.tokens * 2 ** torch.arange(3, -1, -1)).sum(1), chance
            )
            assert float((made - law).abs().max()) < 1e-12
            assert int(run.rounds.min()) < length == int(run.rounds.max())


def test_the_rejection_test_needs_fewer_rounds():
    space = TokenSpace(40, mask_id=40)
    canvas, denoiser = torch.full((64, 12), 40), HashDenoiser(space)
    denoiser.table = denoiser.table * 0.5
    ratio, coupled = (
        sample(denoiser, canvas, space=space, sampler="speculative", seed=1, **options)
        for options in ({}, {"accept": "coupled"})
    )
    assert ratio.rounds.double().mean() < 0.8 * coupled.rounds.double().mean()
    assert ratio.log_prob_is_exact


@pytest.mark.parametrize("order", ORDERS)
def test_at_temperature_zero_both_rules_write_the_greedy_tokens_of_one_a_call(order):
    space = TokenSpace(6, mask_id=6, never=(2,))
    canvas, rest = ragged(space, 16, 9)
    options = {"space": space, "order": order, "temperature": 0.0, **rest}
    one, *rules = (
        sample(HashDenoiser(space), canvas, **options, **how)
        for how in ({"sampler": "any_order"}, *(
            {"sampler": "speculative", "accept": accept} for accept in ("ratio", "coupled")
        ))
    )  # fmt: skip
    for run in rules:
        assert torch.equal(run.tokens, one.tokens)
        assert int(run.rounds.sum()) < int(one.rounds.sum())


def test_the_rejection_test_reports_the_log_probability_of_each_token_given_those_before():
    space = TokenSpace(11, mask_id=11, never=(3,), parts=((4, 2, 6), (3, 7, 11)))
    canvas, label, none = torch.full((6, 7), 11), torch.arange(6), torch.tensor([0])
    denoiser = HashDenoiser(space)
    pair = guided(denoiser, guidance_scale=2.0, without={"label": none}, space=space)
    for draw in ({}, {"temperature": 0.7, "top_k": 2}):
        run = sample(
            pair, canvas, space=space, sampler="speculative", cond={"label": label}, **draw
        )
        assert int(run.rounds.sum()) < 6 * 7
        for position in range(7):
            shown = run.tokens.clone()
            shown[:, position:] = 11
            with_label, without = (
                denoiser(shown, cond={"label": each})[:, position]
                for each in (label, none.expand(6))
            )
            logits = without + 2 * (with_label - without)
            first, stop = (2, 6) if position < 4 else (7, 11)
            ids = torch.tensor([i for i in range(first, stop) if i != 3])
            law = torch.full_like(logits, -torch.inf)
            law[:, ids] = logits[:, ids].log_softmax(1)
            token = run.tokens[:, position, None]
            assert torch.isin(token, ids).all()
            torch.testing.assert_close(
                run.writing.log_prob[:, position], law.gather(1, token)[:, 0], atol=1e-5, rtol=0
            )


def test_logits_that_are_not_numbers_draw_the_lowest_permitted_id():
    space = TokenSpace(5, mask_id=5, never=(0, 4))

    class Broken(HashDenoiser):
        def __call__(self, tokens, *, at=None, **rest):
            logits = super().__call__(tokens, **rest)
            logits[:, ::2] = torch.nan
            return logits if at is None else logits[at]

    for order in ORDERS:
        masks = torch.full((32, 9), 5)
        *_, last = speculative(Broken(space), masks, space=space, order=order)
        assert (last.tokens[:, ::2] == 1).all()
        assert ((last.tokens >= 1) & (last.tokens < 4)).all()
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        sample(Broken(space), masks, space=space, sampler="speculative")


class Adversary:
    """Other greedy tokens at every call, so that no draft is ever right."""

    uses_time, calls = False, 0

    def __call__(self, tokens, *, at=None, valid=None, cond=None, **_):
        self.calls += 1
        one = torch.nn.functional.one_hot(torch.full(tokens.shape, self.calls % 5), 5)
        return 1000.0 * one[at]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adversary_ends_within_as_many_rounds_as_tokens(temperature):
    denoiser, space = Adversary(), TokenSpace(5, mask_id=5)
    canvas = torch.full((3, 12), 5)
    canvas[1, 2:9] = 1
    run = sample(
        denoiser, canvas, space=space, sampler="speculative", drafts=4, temperature=temperature
    )
    assert run.rounds.tolist() == [12, 5, 12]
    assert denoiser.calls == 12
    assert not (run.tokens == 5).any()


def test_states_write_several_positions_a_round_and_given_ones_never():
    space = TokenSpace(3, mask_id=3)
    canvas, rest = ragged(space, 6, 9)
    given = canvas != space.mask_id
    before, last = canvas, None
    for last in speculative(HashDenoiser(space), canvas, space=space, drafts=3, **rest):
        assert not (last.revealed & given).any()
        assert torch.equal(before == last.tokens, ~last.revealed)
        before = last.tokens
    assert last is not None
    assert last.step == int(last.rounds.max()) < int((~given & rest["valid"]).sum(1).max())


BOUND = {
    "plain": {}, "random order": {"order": "random"}, "filters": DRAWS[6], "guided": {},
    "blocks": {"block_length": 3}, "blocks of a context": {"block_length": 2, "context": 4},
}  # fmt: skip


@pytest.mark.parametrize("accept", ["ratio", "coupled"])
@pytest.mark.parametrize("case", BOUND)
def test_a_sample_does_not_depend_on_its_batch_or_its_padding(case, accept):
    space = TokenSpace(4, mask_id=4)
    canvas, rest = ragged(space, 6, 8)
    denoiser, seeds, cond = Timed(space), torch.arange(6), rest["cond"]
    if case == "guided":
        denoiser = guided(denoiser, guidance_scale=1.5, without={"label": torch.tensor([0])},
                          space=space)  # fmt: skip
    options = {"space": space, "sampler": "speculative", "drafts": 3, "accept": accept}
    options |= BOUND[case]
    whole = sample(denoiser, canvas, seed=seeds, **options, **rest)
    given = (canvas != 4) | ~rest["valid"]
    assert torch.equal(whole.tokens[given], canvas[given])
    assert (whole.rounds <= (~given).sum(1)).all()
    for row in range(6):
        own = rest["valid"][row]
        alone = sample(
            denoiser, canvas[row : row + 1, own], seed=seeds[row : row + 1],
            cond={"label": cond["label"][row : row + 1]}, **options,
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], whole.tokens[row, own])
        assert torch.equal(alone.writing.log_prob[0], whole.writing.log_prob[row, own])
        assert (int(alone.calls), int(alone.rounds)) == (
            int(whole.calls[row]), int(whole.rounds[row])
        )  # fmt: skip


def test_a_finished_text_is_revised_where_it_is_hidden():
    space = TokenSpace(4, mask_id=4)
    canvas = torch.tensor([[0, 4, 2, 4, 4, 1]]).repeat(8, 1)
    given = torch.zeros_like(canvas, dtype=torch.bool)
    both(HashDenoiser(space), canvas, space=space, drafts=2, given=given, seed=3)


def test_a_builtin_model_needs_fewer_rounds_than_tokens():
    pipeline = load("builtin:shakespeare")
    canvas = hidden_canvas(1, 16, space=pipeline.space)
    one, coupled, ratio = (
        sample(pipeline.denoiser, canvas, space=pipeline.space, seed=1, **options)
        for options in (
            {"sampler": "any_order"},
            {"sampler": "speculative", "drafts": 2, "accept": "coupled"},
            {"sampler": "speculative", "drafts": 2},
        )
    )
    assert torch.equal(coupled.tokens, one.tokens)
    assert int(ratio.rounds) < 14


@pytest.mark.parametrize("drafts", [0, -3])
def test_drafts_below_one_are_refused(drafts):
    space = TokenSpace(4, mask_id=4)
    with pytest.raises(ConfigError, match=f"drafts={drafts}: need at least 1"):
        sample(HashDenoiser(space), torch.full((1, 3), 4), space=space, sampler="speculative",
               drafts=drafts)  # fmt: skip


@pytest.mark.parametrize("options", [
    {"drafts": 2.0}, {"drafts": "four"}, {"drafts": None}, {"draft": 2}, {"steps": 4},
    {"order": "rnadom"}, {"order": torch.tensor([0, 0, 1])}, {"accept": "ration"},
    {"accept": ""}, {"accept": None}, {"accept": 1}, {"accept": "Ratio\n"}, {"drafts": True},
    {"drafts": float("nan")}, {"temperature": float("nan")}, {"temperature": -1.0},
    {"top_p": 0.0}, {"top_k": 0}, {"min_p": 2.0},
], ids=str)  # fmt: skip
def test_options_that_do_not_fit_are_refused(options):
    space = TokenSpace(4, mask_id=4)
    with pytest.raises(ConfigError) as refused:
        sample(HashDenoiser(space), torch.full((1, 3), 4), space=space, sampler="speculative",
               **options)  # fmt: skip
    assert "\n" not in str(refused.value)


def test_more_drafts_than_positions_are_as_many_as_there_are():
    space = TokenSpace(4, mask_id=4)
    canvas = torch.full((2, 5), 4)
    runs = [
        sample(HashDenoiser(space), canvas, space=space, sampler="speculative", drafts=drafts)
        for drafts in (4, 10**30)
    ]
    assert torch.equal(*(run.tokens for run in runs))
    assert torch.equal(*(run.calls for run in runs))
