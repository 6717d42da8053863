"""The law of speculative: enumerated with its decisions integrated out, and by chi-square."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from revising_toys import FALSE_ALARM, IDEAL, TABLE, agrees
from revising_toys import denoiser as toy_denoiser
from toys import make_toy

from mdiff.denoiser import from_logits
from mdiff.kernels import philox
from mdiff.samplers import speculative as module
from mdiff.sampling import Unmasking
from mdiff.schedule import Linear

FILTERS = ({}, {"temperature": 0.7, "top_k": 2}, {"top_p": 0.6}, {"min_p": 0.4, "temperature": 2.0})


def changed(old, new):
    """The sampler's file with a change of its code."""
    source = inspect.getsource(module)
    assert source.count(old) == 1
    names = {"__name__": "mutant"}
    exec(source.replace(old, new), names)
    return SimpleNamespace(**names)


def conditionals(table, draw):
    """The laws (canvases, L, V) float64 that are drawn from, by sorting; of (T, L, V) logits."""
    p = (table.double() / draw.get("temperature", 1.0)).softmax(-1)
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    ordered[..., draw.get("top_k", p.shape[-1]) :] = 0
    share = ordered / ordered.sum(-1, keepdim=True)
    kept = (share.cumsum(-1) - share < draw.get("top_p", 1.0)) & (ordered > 0)
    kept = kept.gather(-1, rank) & (p >= draw.get("min_p", 0.0) * ordered[..., :1])
    return torch.where(kept, p, 0) / torch.where(kept, p, 0).sum(-1, keepdim=True)


def chain(toy, laws, order):
    """{canvas: probability} of one token a call in this order."""
    law = {}
    for canvas in itertools.product(range(toy.vocab), repeat=toy.length):
        held, law[canvas] = [toy.vocab] * toy.length, 1.0
        for position in order:
            number = int(toy.number(torch.tensor([held])))
            law[canvas] *= float(laws[number, position, canvas[position]])
            held[position] = canvas[position]
    return law


def enumerating(sampler):
    """Its rejection test with each decision given; `weight` (B,) becomes their probability."""

    class Enumerated(sampler._Rejection):
        def decide(self, coins, tokens, drafts):
            """The decisions, (B, L) each; a draft that is never drawn must count once only."""
            self.coins = coins.bool().flatten()
            self.ids = {philox.NOISE: tokens.flatten(), philox.ORDER: drafts.flatten()}
            self.weight = torch.ones(len(coins), dtype=torch.float64)
            self.proposals = torch.zeros(len(coins), dtype=torch.int64)

        def _times(self, factor):
            row = self.fill.positions // self.fill.tokens.shape[1]
            self.weight = self.weight.scatter_reduce(0, row, factor, "prod")
            return row

        def _happens(self, chance):
            happens = self.coins[self.fill.positions]
            self._times(torch.where(happens, chance, 1 - chance))
            return happens

        def _chosen(self, law, otherwise, purpose):
            chosen = self.ids[purpose][self.fill.positions]
            share = law.gather(1, chosen[:, None])[:, 0] / law.sum(1)
            # Nothing is drawn above p = q, where no draft is refused.
            row = self._times(torch.where(law.sum(1) > 0, share, 0))
            if purpose == philox.ORDER:
                self.proposals = self.proposals.index_add(0, row, torch.ones_like(row))
            return chosen

    return Enumerated


def outcomes(vocab, length, order, written, shown):
    """Every decision of a round (N, 3, L): drafts kept or not, tokens drawn, new drafts."""
    number = length - written
    sizes = [2] * shown + [vocab] * (shown + 1) + [vocab] * (number - 1)
    rows = torch.tensor(list(itertools.product(*map(range, sizes))))
    found = torch.zeros(len(rows), 3, length, dtype=torch.int64)
    for kind, (first, columns) in enumerate(
        zip((0, 0, 1), rows.split([shown, shown + 1, number - 1], 1))
    ):
        found[:, kind, order[written + first :][: columns.shape[1]]] = columns
    return found


def enumerated(toy, table, order, drafts, sampler=module, **draw):
    """The law (canvases,) of the sampler's rounds and their mean number, by dynamic programming.

    A state is what is written, the drafts, and the laws that they were drawn from. Every round of
    every state is run by the sampler's code once for each outcome of all its decisions.
    """
    length, mask = toy.length, toy.vocab
    denoiser, kind = from_logits(lambda tokens: table[toy.number(tokens)]), enumerating(sampler)
    law, rounds, order = torch.zeros((mask + 1) ** length).double(), 0.0, torch.tensor(order)
    blank = torch.full((length,), mask)
    # For each number of written tokens: tokens (L,), drafts (L,), probability, laws (L, V).
    states = [[] for _ in range(length)]
    states[0].append((blank, blank, torch.tensor(1.0).double(), torch.zeros(length, mask).double()))
    for written, held in enumerate(states):
        if not held:
            continue
        tokens, guess, before, laws = map(torch.stack, zip(*held))
        shown = min(drafts, length - written - 1) if written else 0
        decisions = outcomes(mask, length, order, written, shown)
        of = torch.arange(len(held)).repeat_interleave(len(decisions))
        fill = Unmasking(denoiser, tokens[of], space=toy.space, seed=0, valid=None, cond=None,
                         **draw)  # fmt: skip
        test = kind(fill)
        test.decide(*decisions.repeat(len(held), 1, 1).unbind(1))
        test.q = laws.flatten(0, 1)
        test.row = (of[:, None] * length + torch.arange(length)).flatten()
        turn = order.argsort().expand(len(of), -1)
        state, guess = sampler._round(
            fill, turn - written, guess[of], shown, drafts, Linear(), test
        )
        rounds += float(before.sum())
        weight = before[of] * test.weight / mask ** (length - written - 1.0 - test.proposals)
        done = (state.tokens < mask).sum(1)
        law.index_add_(0, toy.number(state.tokens), torch.where(done == length, weight, 0))
        # Equal states are one. The same tokens and drafts were drawn from the same laws.
        drafted = (turn >= done[:, None]) & (turn < done[:, None] + drafts)
        goes_on = (done < length) & (weight > 0)
        keys, which = torch.cat([state.tokens, torch.where(drafted, guess, mask)], 1)[
            goes_on
        ].unique(dim=0, return_inverse=True)
        chance = torch.zeros(len(keys)).double().index_add(0, which, weight[goes_on])
        row = torch.where(drafted, test.row.view_as(turn), 0)[goes_on]
        row = torch.zeros(len(keys), length, dtype=torch.int64).index_copy(0, which, row)
        for key, *rest in zip(keys, chance, test.q[row]):
            states[int((key[:length] < mask).sum())].append((key[:length], key[length:], *rest))
    return law, rounds


def off_by(toy, table, order, drafts, sampler=module, **draw):
    """The largest error of the enumerated law, which without filters saves rounds."""
    expected = torch.zeros((toy.vocab + 1) ** toy.length, dtype=torch.float64)
    for canvas, chance in chain(toy, conditionals(table, draw), order).items():
        expected[int(toy.number(torch.tensor([canvas])))] = chance
    law, rounds = enumerated(toy, table, order, drafts, sampler, **draw)
    # Filters may leave one id a position, and drafts all of another one.
    assert rounds < toy.length + bool(draw) * 1e-9
    return float((law - expected).abs().max())


def tables(vocab, length, seed):
    """A toy, its conditionals, and conditionals of no joint."""
    toy = make_toy(vocab, length, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return toy, toy.table, 2 * torch.randn(toy.table.shape, generator=generator).double()


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_the_rejection_test_has_the_law_of_its_order_to_1e_12(drafts):
    for vocab, length, orders in [
        (2, 4, [(0, 1, 2, 3), (2, 0, 3, 1)]), (3, 3, [(1, 2, 0)]),
    ]:  # fmt: skip
        toy, *both = tables(vocab, length, seed=drafts)
        for order, table in itertools.product(orders, both):
            assert off_by(toy, table, order, drafts) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [1, 2, 3])
@pytest.mark.parametrize("vocab", [2, 3])
def test_the_rejection_test_has_the_law_of_every_order_and_filter_to_1e_12(vocab, drafts):
    toy, *both = tables(vocab, 4, seed=7)
    for order, table, draw in itertools.product(
        itertools.permutations(range(4)), both, FILTERS if vocab == 2 else ({},)
    ):
        assert off_by(toy, table, order, drafts, **draw) < 1e-12


@pytest.mark.parametrize("draw", FILTERS, ids=str)
def test_drafts_and_verification_are_both_filtered(draw):
    toy, *both = tables(3, 3, seed=2)
    for table in both:
        assert off_by(toy, table, (1, 2, 0), 2, **draw) < 1e-12


REJECTING = {
    "what is refused is drawn from p": ("return (p - q).clamp(min=0)", "return p"),
    "what p has above q, unsigned": ("return (p - q).clamp(min=0)", "return (p - q).abs()"),
    "every draft that p permits is kept": (
        "(likely / proposed).clamp(max=1)", "(likely > 0).double()"
    ),
    "the inverse ratio": ("likely / proposed", "proposed / likely"),
    "q of another draft": (
        "torch.where(is_draft, self.row[at], 0)", "torch.where(is_draft, self.row[at].flip(0), 0)"
    ),
    "the draw behind the drafts is from the residual": (
        "(is_draft > kept)[:, None]", "(~kept)[:, None]"
    ),
    "drafts that nobody verifies": ("& (made != guess)", "& (made < 0)"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", REJECTING)
def test_a_mutant_of_the_rejection_test_has_another_law(mutant):
    toy, _, table = tables(2, 4, seed=1)
    sampler = changed(*REJECTING[mutant])
    assert off_by(toy, table, (1, 3, 2, 0), 2, sampler) > 1e-3


def rejection(laws):
    """The rejection test of (N, V) laws, with the uniforms (i + 1/2) / N."""
    rule = module._Rejection(Unmasking(
        toy_denoiser(), torch.full((1, IDEAL.length), IDEAL.vocab), space=IDEAL.space, seed=0,
        valid=None, cond=None,
    ))  # fmt: skip
    rule._uniform = lambda purpose: (torch.arange(len(laws)).double() + 0.5) / len(laws)
    return rule


def test_decisions_have_the_chances_that_are_enumerated():
    number = 10_000
    laws = torch.tensor([0.2, 0.0, 0.13, 1.1, 0.0]).double().expand(number, -1)
    found = rejection(laws)._chosen(laws, torch.full((number,), 4), philox.NOISE)
    share = torch.bincount(found, minlength=5) / number
    assert float((share - laws[0] / laws[0].sum()).abs().max()) <= 1 / number
    for chance in (0.0, 0.3, 1.0):
        happens = rejection(laws)._happens(torch.full((number,), chance).double())
        assert abs(float(happens.double().mean()) - chance) < 1 / number
    p, q = torch.rand(2, 50, 6, dtype=torch.float64).softmax(-1)
    for token in range(6):
        kept = module.acceptance(p, q, torch.full((50,), token))
        assert float((kept * q[:, token] - p[:, token]).max()) < 1e-15
        assert float((kept * q[:, token] + module.residual(p, q)[:, token] - p[:, token])
                     .abs().max()) < 1e-15  # fmt: skip


@pytest.mark.parametrize("law", [0.0, float("nan"), 5e-324], ids=str)
def test_where_rounding_or_nan_leaves_no_law_the_draw_of_p_is_taken(law):
    laws = torch.full((64, 3), law).double()
    laws[:, 1:] = 0 if law == law else law
    found = rejection(laws)._chosen(laws, torch.full((64,), 1), philox.NOISE)
    assert torch.isin(found, torch.tensor([0, 1])).all()


ORDER = (2, 1, 0)


def law_of(**draw):
    return chain(IDEAL, conditionals(TABLE, draw), ORDER)


def drawn(masks, sampler=module, **options):
    """Samples of a table that is no joint's, in the order ORDER."""
    *_, last = sampler.speculative(
        toy_denoiser(), masks, space=IDEAL.space, seed=7, order=torch.tensor(ORDER), drafts=2,
        **options,
    )  # fmt: skip
    return last.tokens


@pytest.mark.parametrize(
    "draw", [{}, *(pytest.param(draw, marks=pytest.mark.slow) for draw in FILTERS[1:])], ids=str
)
def test_samples_of_the_rejection_test_have_the_law_of_its_order(draw, masks):
    assert agrees(drawn(masks, **draw), law_of(**draw)) > FALSE_ALARM


def test_coupled_samples_have_the_law_of_their_order(masks):
    assert agrees(drawn(masks, accept="coupled"), law_of()) > FALSE_ALARM


SAMPLED = {
    "one number keeps a draft and draws what is written instead": (
        "self._uniform(philox.REVEAL)", "self._uniform(philox.NOISE)", "ratio"
    ),
    "one number draws a draft and keeps it": (
        "drawn.tokens, philox.ORDER", "drawn.tokens, philox.REVEAL", "ratio"
    ),
    "one number draws a draft and what is written instead": (
        "drawn.tokens, philox.ORDER", "drawn.tokens, philox.NOISE", "ratio"
    ),
    "coupled drafts that nobody verifies": ("& (made != guess)", "& (made < 0)", "coupled"),
    "the coupled draft that differs is kept": (
        "    state = fill.reveal(",
        "    verified = verified._replace(tokens=torch.where(lane[:, 0] < deep[sample][:, 0], "
        "guess.flatten()[positions], verified.tokens))\n    state = fill.reveal(", "coupled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", SAMPLED)
def test_samples_of_a_mutant_have_another_law(mutant, masks):
    old, new, accept = SAMPLED[mutant]
    tokens = drawn(masks[:10_000], changed(old, new), accept=accept)
    assert agrees(tokens, law_of()) < FALSE_ALARM


def test_counters_of_the_round_keep_the_coupled_law_but_not_the_tokens(masks):
    """The tokens that are written are always draws of their own law, given those before them."""
    mutant = changed(
        "turn.flatten()[fill.positions]", "torch.full_like(fill.positions, fill.states)"
    )
    tokens = drawn(masks, mutant, accept="coupled")
    assert agrees(tokens, law_of()) > FALSE_ALARM
    assert not torch.equal(tokens[:100], drawn(masks[:100], accept="coupled"))
