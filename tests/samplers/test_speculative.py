"""Speculative: the tokens of `any_order` draw for draw, in fewer rounds of calls."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from folders import GOLDEN
from revising_toys import FALSE_ALARM, IDEAL, TABLE, agrees
from revising_toys import denoiser as toy_denoiser
from toys import HashDenoiser, make_toy

import mdiff
from mdiff.denoiser import guided
from mdiff.denoiser.negative_condition import negative_prompt
from mdiff.errors import ConfigError
from mdiff.ops import bind_draw
from mdiff.pipeline import load
from mdiff.samplers import speculative as module
from mdiff.samplers.speculative import speculative
from mdiff.sampling import sample
from mdiff.schedule import Cosine
from mdiff.tokens import TokenSpace, hidden_canvas

ORDERS = ("left_to_right", "right_to_left", "random")
DRAWS = (
    {}, {"temperature": 0.0}, {"temperature": 0.6}, {"temperature": 1.5}, {"top_k": 2},
    {"top_p": 0.8}, {"min_p": 0.3, "temperature": 0.8},
)  # fmt: skip


class Timed(HashDenoiser):
    """A toy whose logits depend on the time of each row too."""

    uses_time = True

    def __call__(self, tokens, *, at=None, t=None, **rest):
        logits = super().__call__(tokens, **rest)
        logits = logits * (1 + (t * 8).round()[:, None, None])
        return logits if at is None else logits[at]


def ragged(space, rows, length, *, labels=True):
    """Canvases of all lengths and starts, tokens given among the masks, and a label a row."""
    generator = torch.Generator().manual_seed(rows + length)
    hide = torch.rand(rows, length, generator=generator) < torch.linspace(0.3, 1.2, rows)[:, None]
    canvas = torch.where(
        hide, space.mask_id, torch.randint(0, space.vocab_size, (rows, length), generator=generator)
    )
    first = torch.arange(rows) % 3
    valid = torch.arange(length) >= first[:, None]
    return canvas, {"valid": valid, "cond": {"label": torch.arange(rows)} if labels else None}


def both(denoiser, canvas, *, space, drafts, branches=1, **options):
    """The samples of `any_order` and of `speculative`, which must be the same but for calls."""
    expected = sample(denoiser, canvas, space=space, sampler="any_order", **options)
    found = sample(denoiser, canvas, space=space, sampler="speculative", drafts=drafts, **options)
    hidden = canvas == space.mask_id
    if options.get("valid") is not None:
        hidden &= options["valid"]
    assert torch.equal(found.tokens, expected.tokens)
    for name in ("log_prob", "entropy", "margin", "times"):
        assert torch.equal(getattr(found.writing, name), getattr(expected.writing, name)), name
    assert found.log_prob_is_exact == expected.log_prob_is_exact
    assert float(found.nats_spent.abs().sum()) == 0
    assert (found.rounds <= hidden.sum(1)).all()
    assert (found.calls >= found.rounds).all()
    assert (found.calls <= branches * found.rounds * (drafts + 1)).all()
    return expected, found


def test_tokens_and_figures_are_those_of_any_order_draw_for_draw():
    saved = 0
    for toy, (vocab, length) in enumerate([(2, 5), (3, 4), (2, 1), (11, 9)]):
        space = TokenSpace(vocab, mask_id=vocab)
        canvas, rest = ragged(space, 24, length)
        for case, draw in enumerate(DRAWS):
            kind = Timed if case % 2 else HashDenoiser
            denoiser = kind(space, seed=toy)
            denoiser.table *= 1 + 2 * (case % 3)
            permutation = torch.rand(24, length).argsort(1)
            for order, drafts in zip(
                (*ORDERS, permutation), ((1, 2, 3, 8), (8, 1, 2, 3))[case % 2]
            ):
                expected, found = both(
                    denoiser, canvas, space=space, drafts=drafts, order=order, seed=toy + case,
                    schedule=Cosine(), **draw, **rest,
                )  # fmt: skip
                saved += int((expected.rounds - found.rounds).sum())
    assert saved > 500


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


LAW = {}
for canvas in itertools.product(range(IDEAL.vocab), repeat=IDEAL.length):
    held, chance = [IDEAL.vocab] * IDEAL.length, 1.0
    for position in (1, 2, 0):
        number = int(IDEAL.number(torch.tensor([held])))
        chance *= float(TABLE[number, position, canvas[position]].exp())
        held[position] = canvas[position]
    LAW[canvas] = chance


def law_of(draw):
    """The law of the order with a temperature and filters."""
    bound, law = bind_draw(IDEAL.vocab, **draw), {}
    for canvas in LAW:
        held, law[canvas] = [IDEAL.vocab] * IDEAL.length, 1.0
        for position in (1, 2, 0):
            logits = TABLE[int(IDEAL.number(torch.tensor([held]))), position][None]
            heat, top_k = draw.get("temperature", 1.0), draw.get("top_k", IDEAL.vocab)
            p, kept = (logits / heat).softmax(1)[0], 0.0
            allowed = set()
            for token in p.argsort(descending=True, stable=True).tolist()[:top_k]:
                if kept < draw.get("top_p", 1.0):
                    allowed.add(token)
                kept += float(p[token])
            total = sum(float(p[token]) for token in allowed)
            token = canvas[position]
            law[canvas] *= float(p[token]) / total if token in allowed else 0.0
            assert abs(float(bound.drawn_law(logits)[0, token]) - (
                float(p[token]) / total if token in allowed else 0.0)) < 1e-12  # fmt: skip
            held[position] = token
    return law


def drawn(masks, function=speculative, **options):
    """Samples of a table that is no joint's, in the order of LAW."""
    *_, last = function(
        toy_denoiser(),
        masks,
        space=IDEAL.space,
        seed=7,
        order=torch.tensor([1, 2, 0]),
        drafts=2,
        **options,
    )
    return last.tokens


def test_speculative_has_the_law_of_its_order(masks):
    assert agrees(drawn(masks), LAW) > FALSE_ALARM


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.7, "top_k": 2}, {"top_p": 0.6}], ids=str)
def test_the_rejection_test_has_the_law_of_its_order(draw, masks):
    law = LAW if not draw else law_of(draw)
    assert agrees(drawn(masks, accept="ratio", **draw), law) > FALSE_ALARM


REJECTING = {
    "what is refused is drawn from p": ("(p - q).clamp(min=0), p)", "p, p)"),
    "all that p permits is accepted": (
        "self._uniform(philox.REVEAL) * proposed < likely", "likely > 0"
    ),
    "the inverse ratio": (
        "self._uniform(philox.REVEAL) * proposed < likely",
        "self._uniform(philox.REVEAL) * likely < proposed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", REJECTING)
def test_a_mutant_of_the_rejection_test_has_another_law(mutant, masks):
    tokens = drawn(masks, changed(*REJECTING[mutant]), accept="ratio")
    assert agrees(tokens, LAW) < FALSE_ALARM


def test_the_rejection_test_needs_fewer_rounds_and_is_greedy_at_temperature_zero(masks):
    space, length = TokenSpace(40, mask_id=40), 12
    canvas, denoiser = torch.full((64, length), 40), HashDenoiser(space)
    denoiser.table = denoiser.table * 0.5
    options = {"space": space, "sampler": "speculative", "seed": 1}
    runs = [sample(denoiser, canvas, accept=each, **options) for each in ("ratio", "coupled")]
    assert runs[0].rounds.double().mean() < 0.8 * runs[1].rounds.double().mean()
    assert runs[0].log_prob_is_exact
    greedy = [
        sample(denoiser, canvas, accept=each, temperature=0.0, **options).tokens
        for each in ("ratio", "coupled")
    ]
    assert torch.equal(*greedy)


def test_the_rejection_test_has_figures_of_its_tokens_and_no_batch():
    space = TokenSpace(11, mask_id=11, never=(3,), parts=((4, 2, 6), (3, 7, 11)))
    canvas, seeds = torch.full((6, 7), 11), torch.arange(6)
    pair = guided(
        HashDenoiser(space), guidance_scale=2.0, without={"label": torch.tensor([0])}, space=space
    )
    options = {"space": space, "sampler": "speculative", "accept": "ratio", "order": "random"}
    cond = {"label": torch.arange(6)}
    run = sample(pair, canvas, seed=seeds, cond=cond, **options)
    assert torch.isin(run.tokens[:, :4], torch.tensor([2, 4, 5])).all()
    assert ((run.tokens[:, 4:] >= 7) & (run.tokens[:, 4:] < 11)).all()
    assert (run.writing.log_prob < 0).all()
    for row in range(6):
        one = slice(row, row + 1)
        alone = sample(pair, canvas[one], seed=seeds[one], cond={"label": cond["label"][one]},
                       **options)  # fmt: skip
        assert torch.equal(alone.tokens[0], run.tokens[row])
        assert torch.equal(alone.writing.log_prob[0], run.writing.log_prob[row])


MUTANTS = {
    "drafts that nobody verifies": ("& (made != guess)", "& (made < 0)"),
    "the draft that differs is kept": (
        "    state = fill.reveal(",
        "    verified = verified._replace(tokens=torch.where(lane[:, 0] < deep[sample][:, 0], "
        "guess.flatten()[positions], verified.tokens))\n    state = fill.reveal(",
    ),
}  # fmt: skip


def changed(old, new):
    """The sampler with a change of its code."""
    source = inspect.getsource(module)
    assert source.count(old) == 1
    names = {"__name__": "mutant"}
    exec(source.replace(old, new), names)
    return names["speculative"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_has_another_law(mutant, masks):
    assert agrees(drawn(masks, changed(*MUTANTS[mutant])), LAW) < FALSE_ALARM


def test_counters_of_the_round_keep_the_law_but_not_the_tokens(masks):
    """The tokens that are written are always draws of their own law, given those before them."""
    mutant = changed(
        "turn.flatten()[fill.positions]", "torch.full_like(fill.positions, fill.states)"
    )
    tokens = drawn(masks, mutant)
    assert agrees(tokens, LAW) > FALSE_ALARM
    assert not torch.equal(tokens, drawn(masks))


class Adversary:
    """Other greedy tokens at every call, so that no draft is ever right."""

    uses_time, calls = False, 0

    def __call__(self, tokens, *, at=None, valid=None, cond=None, **_):
        self.calls += 1
        return torch.nn.functional.one_hot(torch.full(tokens.shape, self.calls % 5), 5).float()[at]


def test_an_adversary_ends_within_as_many_rounds_as_tokens():
    denoiser, space = Adversary(), TokenSpace(5, mask_id=5)
    canvas = torch.full((3, 12), 5)
    canvas[1, 2:9] = 1
    run = sample(denoiser, canvas, space=space, sampler="speculative", drafts=4, temperature=0.0)
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


def test_a_sample_does_not_depend_on_its_batch():
    space = TokenSpace(4, mask_id=4)
    canvas, rest = ragged(space, 5, 8)
    options = {"space": space, "sampler": "speculative", "drafts": 3}
    seeds = torch.arange(5)
    whole = sample(HashDenoiser(space), canvas, seed=seeds, **options, **rest)
    for row in range(5):
        one = slice(row, row + 1)
        alone = sample(
            HashDenoiser(space), canvas[one], seed=seeds[one], valid=rest["valid"][one],
            cond={"label": torch.tensor([row])}, **options,
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert (int(alone.calls), int(alone.rounds)) == (
            int(whole.calls[row]), int(whole.rounds[row])
        )  # fmt: skip


def test_a_finished_text_is_revised_where_it_is_hidden():
    space = TokenSpace(4, mask_id=4)
    canvas = torch.tensor([[0, 4, 2, 4, 4, 1]]).repeat(8, 1)
    given = torch.zeros_like(canvas, dtype=torch.bool)
    both(HashDenoiser(space), canvas, space=space, drafts=2, given=given, seed=3)


def test_canvases_of_parts_are_drawn_within_their_parts():
    space = TokenSpace(11, mask_id=11, never=(3,), parts=((4, 2, 6), (3, 7, 11)))
    canvas = torch.full((6, 7), 11)
    both(HashDenoiser(space), canvas, space=space, drafts=3, order="random", seed=4)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_is_that_of_each_canvas(schedule):
    space = TokenSpace(5, mask_id=5)
    pair = guided(
        HashDenoiser(space), guidance_scale=2.0, without={"label": torch.tensor([0])}, space=space,
        guidance_schedule=schedule,
    )  # fmt: skip
    canvas, rest = ragged(space, 6, 7)
    _, found = both(pair, canvas, space=space, drafts=3, branches=2, seed=2, **rest)
    # Two branches a canvas, but where the scale is 1.
    assert int(found.calls.sum()) > int(found.rounds.sum())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_negative_prompt_is_bound_to_each_canvas(rows):
    space = TokenSpace(5, mask_id=5)
    canvas = torch.full((rows, 9), 5)
    for row in range(rows):
        canvas[row, : row + 1] = row % 5
    bind = negative_prompt(
        HashDenoiser(space), torch.tensor([3, 1]), space=space, guidance_scale=2.5
    )
    both(bind(canvas, None), canvas, space=space, drafts=2, branches=2, seed=2)


@pytest.mark.parametrize("block_length", [1, 3, 4])
@pytest.mark.parametrize("context", [None, 5])
def test_blocks_run_it_in_each_block(block_length, context):
    space = TokenSpace(4, mask_id=4)
    canvas, rest = ragged(space, 6, 10)
    both(
        Timed(space), canvas, space=space, drafts=2, order="random", seed=4, context=context,
        block_length=block_length, **rest,
    )  # fmt: skip


def test_a_block_model_keeps_its_finished_blocks_once_for_all_canvases():
    model = mdiff.load(str(GOLDEN / "llada2_moe"), mask_id=62, block_length=4, device="cpu")
    space, shown = TokenSpace(64, mask_id=62), []
    canvas = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(1))
    canvas[:, 2:] = 62
    canvas[:, 9] = 7
    model.denoiser.trunk()[0].register_forward_pre_hook(lambda _, call: shown.append(call[0].shape))
    options = {"order": "random", "seed": 5, "temperature": 0.7}
    expected = sample(model.denoiser, canvas, space=space, sampler="any_order", **options)
    shown.clear()
    run = sample(model.denoiser, canvas, space=space, sampler="speculative", drafts=3, **options)
    assert torch.equal(run.tokens, expected.tokens)
    torch.testing.assert_close(run.log_prob, expected.log_prob, atol=1e-4, rtol=0)
    assert {shape[1] for shape in shown} == {4}
    # Three finished blocks cost one pass of the batch each; all other rows are canvases.
    assert sum(shape[0] for shape in shown) == 3 * 3 + int(run.calls.sum())
    assert int(run.rounds.sum()) < int(expected.rounds.sum())


def test_a_builtin_model_needs_fewer_rounds_than_tokens():
    pipeline = load("builtin:shakespeare")
    canvas = hidden_canvas(1, 32, space=pipeline.space)
    _, found = samples = [
        sample(pipeline.denoiser, canvas, space=pipeline.space, sampler=name, seed=1)
        for name in ("any_order", "speculative")
    ]
    assert torch.equal(*(each.tokens for each in samples))
    assert int(found.rounds) < 31


@pytest.mark.parametrize("drafts", [0, -3])
def test_drafts_below_one_are_refused(drafts):
    space = TokenSpace(4, mask_id=4)
    with pytest.raises(ConfigError, match=f"drafts={drafts}: need at least 1"):
        sample(HashDenoiser(space), torch.full((1, 3), 4), space=space, sampler="speculative",
               drafts=drafts)  # fmt: skip


@pytest.mark.parametrize("options", [
    {"drafts": 2.0}, {"drafts": "four"}, {"drafts": None}, {"draft": 2}, {"steps": 4},
    {"order": "rnadom"}, {"accept": "ration"}, {"order": torch.tensor([0, 0, 1])},
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
        for drafts in (4, 10**9)
    ]
    assert torch.equal(*(run.tokens for run in runs))
    assert torch.equal(*(run.calls for run in runs))
