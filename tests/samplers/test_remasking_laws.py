"""ReMDM and Psi against their own laws, enumerated with the memory of the rule."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from revising_toys import FALSE_ALARM, IDEAL, LENGTH, MASK, TABLE, agrees, denoiser, p_of, run
from toys import HashDenoiser

from mdiff import sample
from mdiff.find import find
from mdiff.samplers.remdm import loop_shares
from mdiff.sampling import grid_of_shares, largest_sigma, stays_hidden
from mdiff.schedule import Cosine, Linear, Polynomial
from mdiff.tokens import TokenSpace


def chain(shares, sigma, table=TABLE, begin=None):
    """The law of the hiding chain; `sigma(m_t, m_s, canvas, memory)` is one number a position.

    `memory` are the probabilities at the last writing, which are part of the state.
    """
    law = {(begin or (MASK,) * LENGTH, (1.0,) * LENGTH): 1.0}
    for m_t, m_s in itertools.pairwise(shares):
        following = defaultdict(float)
        for (canvas, memory), chance in law.items():
            hides = sigma(m_t, m_s, canvas, memory)
            p = p_of(canvas, table)
            options = []
            for i, token in enumerate(canvas):
                if token == MASK:
                    stays = float(stays_hidden(m_t, m_s, hides[i]))
                    each = [((v, p[i][v]), (1 - stays) * p[i][v]) for v in range(MASK)]
                    options.append([((MASK, 1.0), stays), *each])
                else:
                    kept = ((token, memory[i]), 1 - hides[i])
                    options.append([kept, ((MASK, 1.0), hides[i])])
            for each in itertools.product(*options):
                share = chance
                for _, part in each:
                    share *= part
                if share > 0:
                    now = tuple(token for (token, _), _ in each)
                    # The memory matters to `conf` alone; elsewhere it only splits states.
                    kept = tuple(round(q, 12) for (_, q), _ in each)
                    following[now, kept if sigma.remembers else (1.0,) * LENGTH] += share
        law = following
    total = defaultdict(float)
    for (canvas, _), chance in law.items():
        total[canvas] += chance
    return dict(total)


def everywhere(rule):
    def sigma(m_t, m_s, canvas, memory):
        return [rule(m_t, m_s)] * LENGTH

    sigma.remembers = False
    return sigma


def by_confidence(m_t, m_s, canvas, memory):
    most = largest_sigma(m_t, m_s)
    weight = [0.0 if c == MASK else float(torch.tensor(-q).exp()) for c, q in zip(canvas, memory)]
    return [most * w / max(sum(weight), 1e-300) for w in weight]


by_confidence.remembers = True


RULES = {
    "cap": ({"rule": "cap", "eta": 0.3}, everywhere(lambda t, s: min(0.3, largest_sigma(t, s)))),
    "rescale": (
        {"rule": "rescale", "eta": 0.5}, everywhere(lambda t, s: 0.5 * largest_sigma(t, s)),
    ),
    "forward_backward": (
        {"rule": "forward_backward"},
        everywhere(lambda t, s: min(largest_sigma(t, s), (t - s) / (1 - t) if t < 1 else 1.0)),
    ),
    "conf": ({"rule": "conf"}, by_confidence),
}  # fmt: skip


@pytest.mark.parametrize("schedule", [Linear(), Polynomial(2.0)], ids=str)
@pytest.mark.parametrize("case", RULES)
def test_remdm_has_its_own_enumerated_law(case, schedule, masks):
    options, sigma = RULES[case]
    steps = 3 if case == "conf" else 6
    law = chain(grid_of_shares(schedule, steps, None, None).tolist(), sigma)
    made = run("remdm", masks, steps=steps, schedule=schedule, **options)
    assert agrees(made.tokens, law) > FALSE_ALARM
    assert not made.log_prob_is_exact


def test_remdm_without_its_rule_is_rejected_against_the_law_with_it(masks):
    law = chain(grid_of_shares(Linear(), 6, None, None).tolist(), RULES["rescale"][1])
    for mutant in ({"rule": "rescale", "eta": 0.25}, {"rule": "cap", "eta": 0.0}):
        assert agrees(run("remdm", masks, steps=6, **mutant).tokens, law) < FALSE_ALARM


def test_the_loop_has_its_own_enumerated_law_and_never_hides_more_than_there_is(masks):
    shares = loop_shares(12).tolist()
    assert shares[0] == 1
    assert shares[-1] == 0
    law = chain(shares, everywhere(lambda t, s: min(0.6, largest_sigma(t, s)) if t == s else 0.0))
    assert agrees(run("remdm", masks, steps=12, rule="loop", eta=0.6).tokens, law) > FALSE_ALARM
    # The published code lets sigma exceed its limit: a chance of -4.4 at eta 0.6.
    assert float(stays_hidden(0.1, 0.1, 0.6)) < 0
    assert float(stays_hidden(0.1, 0.1, min(0.6, largest_sigma(0.1, 0.1)))) >= 0


@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.9])
def test_psi_has_its_own_enumerated_law(kappa, masks):
    shares = grid_of_shares(Cosine(), 5, None, None).tolist()
    law = chain(shares, everywhere(lambda t, s: (1 - kappa) * s))
    assert (
        agrees(run("psi", masks, steps=5, schedule=Cosine(), kappa=kappa).tokens, law) > FALSE_ALARM
    )


def test_a_finished_canvas_is_hidden_to_the_share_of_its_start(masks):
    canvas = torch.tensor([[0, 2, 1]]).repeat(len(masks), 1)
    given = torch.tensor([[False, True, False]]).repeat(len(masks), 1)
    states = find("samplers", "remdm")(
        denoiser(), canvas, space=IDEAL.space, seed=3, given=given, steps=4, start=0.4, eta=0.2,
    )  # fmt: skip
    first = next(states)
    share = first.hidden_again.double().mean(0).tolist()
    assert share[1] == 0
    assert abs(share[0] - 0.4) < 0.01
    assert abs(share[2] - 0.4) < 0.01
    *_, last = states
    assert (last.tokens[:, 1] == 2).all()
    assert (last.tokens < MASK).all()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(3.0)], ids=str)
def test_marginals_are_those_of_masking_whatever_is_hidden_again(schedule):
    """With a prediction that is certain: x_0 with 1 - m, the mask with m, to 1e-10."""
    rules = [
        lambda t, s: 0.0,
        lambda t, s: min(0.02, largest_sigma(t, s)),
        lambda t, s: 0.7 * largest_sigma(t, s),
        largest_sigma,
        lambda t, s: min(largest_sigma(t, s), (t - s) / (1 - t) if t < 1 else 1.0),
        *(lambda t, s, k=k: (1 - k) * s for k in (0.0, 0.3, 1.0)),
    ]
    for rule, shares in itertools.product(
        rules, [grid_of_shares(schedule, 37, None, None), loop_shares(200)]
    ):
        hidden = 1.0
        for m_t, m_s in itertools.pairwise(shares.tolist()):
            sigma = rule(m_t, m_s)
            stays = float(stays_hidden(m_t, m_s, sigma)) if m_t else 1.0
            assert -1e-12 < stays < 1 + 1e-12
            hidden = hidden * stays + (1 - hidden) * sigma
            assert abs(hidden - m_s) < 1e-10


def test_without_hiding_the_draws_are_those_of_ancestral():
    canvas = torch.full((64, 12), 5)
    space = TokenSpace(11, mask_id=5, never=(0, 9))
    options = {"space": space, "seed": 2, "steps": 23, "schedule": Cosine()}
    expected = sample(HashDenoiser(space), canvas, sampler="ancestral", **options)
    for name, setting in (
        ("remdm", {"eta": 0.0}), ("remdm", {"eta": 0, "rule": "rescale"}), ("psi", {"kappa": 1.0}),
    ):  # fmt: skip
        made = sample(HashDenoiser(space), canvas, sampler=name, **options, **setting)
        assert torch.equal(made.tokens, expected.tokens)
        assert torch.equal(made.calls, expected.calls)
        assert torch.equal(made.log_prob, expected.log_prob)
