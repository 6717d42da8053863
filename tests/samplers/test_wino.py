"""WINO against its own law, enumerated, and by shadows as by a canvas for each token."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from revising_toys import FALSE_ALARM
from scipy import stats
from toys import make_toy

from mdiff import from_logits, sample
from mdiff.backbones.transformer import transformer
from mdiff.denoiser import guided
from mdiff.find import find
from mdiff.tokens import TokenSpace

TOY = make_toy(2, 5, seed=5)
MASK, LENGTH = TOY.vocab, TOY.length
generator = torch.Generator().manual_seed(9)
# Conditionals of no joint, so that a written token is not certain to stand.
TABLE = (1.3 * torch.randn(TOY.table.shape, generator=generator, dtype=torch.float64)).log_softmax(
    -1
)
P = TABLE.exp().tolist()
RULE = {"threshold": 0.55, "keep_threshold": 0.7, "share": 0.7, "floor": 2, "most": 3}
MUTANTS = ("above", "as_many", "own_token", "always", "of_this_round", "strictly_more", "no_limit")


def p_of(canvas):
    number = 0
    for token in canvas:
        number = number * (MASK + 1) + token
    return P[number]


assert all(
    int(TOY.number(torch.tensor([c]))) == sum(v * 3 ** (LENGTH - 1 - i) for i, v in enumerate(c))
    for c in ((0, 1, 2, 0, 1), (2, 2, 1, 0, 0))
)


def left_out(canvas, i, mutant):
    hidden = canvas if mutant == "own_token" else (*canvas[:i], MASK, *canvas[i + 1 :])
    return p_of(hidden)[i][canvas[i]]


def steps(canvas, last, first, mutant):
    """[(chance, canvas after, number written)] of one round."""
    p = p_of(canvas)
    masks = [i for i in range(LENGTH) if canvas[i] == MASK]
    standing = [i for i in range(LENGTH) if canvas[i] != MASK]
    cap = min(max(int(RULE["share"] * len(masks) + 1e-9), RULE["floor"]), RULE["most"])
    kept = {i: left_out(canvas, i, mutant) for i in standing} if last > 1 else {}
    for tokens in itertools.product(range(MASK), repeat=len(masks)):
        drawn = dict(zip(masks, tokens))
        chance = 1.0
        for i in masks:
            chance *= p[i][drawn[i]]
        above = sum(p[i][drawn[i]] > RULE["threshold"] for i in masks)
        count = above if mutant == "no_limit" else min(above, cap)
        write = sorted(masks, key=lambda i: (-p[i][drawn[i]], i))[: max(count, 1)]
        tau = RULE["keep_threshold"]
        doubtful = [i for i in kept if (kept[i] >= tau if mutant == "above" else kept[i] < tau)]
        most = (len(write) if mutant == "of_this_round" else last) - (mutant != "as_many")
        least = 0 if mutant == "always" or first else 1 + (mutant == "strictly_more")
        hide = sorted(doubtful, key=lambda i: (kept[i], i))[: max(most, 0)]
        after = list(canvas)
        for i in write:
            after[i] = drawn[i]
        if len(write) > least or (first and not masks):
            for i in hide:
                after[i] = MASK
        yield chance, tuple(after), len(write)


def law_of(begin, mutant=None):
    """The law over finished canvases, with the number written last as memory.

    A mutant may not end; what it leaves after many rounds has no law.
    """
    standing = sum(v != MASK for v in begin)
    law, done, first = {(begin, standing): 1.0}, defaultdict(float), MASK not in begin
    for _ in range(14 if mutant else LENGTH):
        following = defaultdict(float)
        for (canvas, last), chance in law.items():
            for share, after, count in steps(canvas, last, first, mutant):
                if MASK in after:
                    following[after, count] += chance * share
                else:
                    done[after] += chance * share
        law, first = following, False
    assert mutant or not law
    return dict(done)


def agrees(tokens, law):
    """The p-value of samples (N, L) under the law."""
    found = torch.bincount(TOY.number(tokens), minlength=len(P)).double()
    expected = torch.zeros_like(found)
    for canvas, chance in law.items():
        expected[int(TOY.number(torch.tensor([canvas])))] += chance * len(tokens)
    if found[expected == 0].sum() > 0:
        return 0.0
    keep = expected > 5
    if (rare := float(expected[~keep].sum())) > 0:
        found = torch.cat([found[keep], found[~keep].sum()[None]])
        expected = torch.cat([expected[keep], torch.tensor([rare]).double()])
        keep = expected > 0
    statistic = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(float(statistic), int(keep.sum()) - 1))


def run(canvas, **options):
    model = from_logits(lambda tokens: TABLE[TOY.number(tokens)])
    return sample(model, canvas, space=TOY.space, sampler="wino", seed=3, **RULE, **options)


@pytest.mark.parametrize("number", [40_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_wino_has_its_own_enumerated_law_and_its_mutants_do_not(number):
    begin = (MASK,) * LENGTH
    made = run(torch.tensor([begin]).repeat(number, 1))
    assert agrees(made.tokens, law_of(begin)) > FALSE_ALARM
    assert int(made.rounds.max()) <= LENGTH
    # A round counts one call and one for each token whose probability is asked for.
    assert (made.calls >= made.rounds).all()
    assert int(made.calls.max()) <= LENGTH * LENGTH
    for mutant in MUTANTS:
        assert agrees(made.tokens, law_of(begin, mutant)) < FALSE_ALARM, mutant


@pytest.mark.parametrize("begin", [(0, 1, 1, 0, 1), (0, MASK, 1, MASK, MASK)], ids=str)
def test_wino_has_its_own_enumerated_law_from_a_canvas_that_may_change(begin):
    canvas = torch.tensor([begin]).repeat(20_000, 1)
    made = run(canvas, given=torch.zeros_like(canvas, dtype=torch.bool))
    assert agrees(made.tokens, law_of(begin)) > FALSE_ALARM
    assert agrees(made.tokens, law_of(begin, "as_many")) < FALSE_ALARM
    assert int(made.rounds.max()) <= LENGTH


SPACE = TokenSpace(11, mask_id=11)


def one_layer(**options):
    torch.manual_seed(1)
    return transformer(
        vocab_size=11, width=16, depth=1, heads=2, mlp_width=16, init_std=0.5, **options
    ).eval()


def by_canvases(model):
    """The same model without its shadows."""

    class Plain:
        uses_time = model.uses_time

        def __call__(self, tokens, **rest):
            return model(tokens, **rest)

    return Plain()


@pytest.mark.parametrize("kind", ["plain", "guided", "blocks", "given"])
def test_with_one_layer_shadows_give_the_tokens_of_a_canvas_for_each_token(kind):
    model = one_layer(classes=3) if kind == "guided" else one_layer()
    options = {"keep_threshold": 0.5, "threshold": 0.1, "floor": 3, "seed": 5}
    canvas = torch.full((6, 12), 11)
    if kind == "guided":
        options["cond"] = {"label": torch.arange(6) % 3}
    if kind == "blocks":
        options["block_length"] = 6
    if kind == "given":
        canvas[:, ::3] = 2
        options["valid"] = torch.arange(12) < torch.tensor([12, 5, 9, 12, 7, 3])[:, None]
    made = []
    for each in (model, by_canvases(model)):
        if kind == "guided":
            each = guided(each, guidance_scale=2.0, without={"label": torch.tensor(3)})
        made.append(sample(each, canvas, space=SPACE, sampler="wino", **options))
    shadows, canvases = made
    assert torch.equal(shadows.tokens, canvases.tokens)
    assert torch.equal(shadows.rounds, canvases.rounds)
    factor = 2 if kind == "guided" else 1
    assert torch.equal(shadows.calls, factor * shadows.rounds)
    assert (canvases.calls > shadows.calls).any()
    assert (shadows.writing.times > 1).any()


def test_given_tokens_stay_and_what_is_hidden_again_was_written():
    model, canvas = one_layer(), torch.full((4, 12), 11)
    canvas[:, 3:6] = 2
    hidden_again = torch.zeros(4, 12, dtype=torch.bool)
    states = find("samplers", "wino")(
        model, canvas, space=SPACE, keep_threshold=1.0, threshold=0.05
    )
    with torch.no_grad():
        for state in states:
            assert (state.tokens[:, 3:6] == 2).all()
            hidden_again |= state.hidden_again
    assert hidden_again.any()
