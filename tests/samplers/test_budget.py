"""The budget in nats: its own law, what it spends, and the divergence that it bounds."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from revising_toys import FALSE_ALARM, IDEAL, agrees, run
from toys import make_toy


def budgeted(toy, total, per_call=None):
    """The law of `budget` on a toy, its mean of nats spent under the joint, and the largest."""
    length, mask = toy.length, toy.vocab
    p, entropy = toy.table.exp(), -(toy.table.exp() * toy.table.clamp(min=-700)).sum(-1)
    base = [(mask + 1) ** (length - 1 - i) for i in range(length)]
    law, done = {((mask,) * length, 0.0): 1.0}, {}
    while law:
        following = defaultdict(float)
        for (canvas, spent), chance in law.items():
            number = sum(v * b for v, b in zip(canvas, base))
            hidden = [i for i in range(length) if canvas[i] == mask]
            ranked = sorted(hidden, key=lambda i: (float(entropy[number, i]), i))
            cost, count, price = 0.0, 1, 0.0
            for k in range(1, len(ranked) + 1):
                done_by = length - len(hidden) + k
                if per_call is None:
                    fits = spent + cost <= total * done_by / length
                else:
                    fits = cost <= per_call
                if fits:
                    count, price = k, cost
                cost += float(entropy[number, ranked[k - 1]])
            chosen = ranked[:count]
            for tokens in itertools.product(range(mask), repeat=count):
                share, after = chance, list(canvas)
                for i, v in zip(chosen, tokens):
                    share, after[i] = share * float(p[number, i, v]), v
                if mask in after:
                    following[tuple(after), spent + price] += share
                else:
                    done[tuple(after)] = (done.get(tuple(after), (0.0, 0.0))[0] + share,
                                          spent + price)  # fmt: skip
        law = following
    return done


@pytest.mark.parametrize("options", [{"nats": 1.0}, {"nats": 0.0}, {"nats_per_call": 0.7}], ids=str)
def test_budget_has_its_own_enumerated_law_and_says_what_it_spent(options, masks):
    law = budgeted(IDEAL, options.get("nats"), options.get("nats_per_call"))
    made = run("budget", masks, table=IDEAL.table, **options)
    assert (
        agrees(made.tokens, {canvas: chance for canvas, (chance, _) in law.items()}) > FALSE_ALARM
    )
    for canvas, (_, spent) in law.items():
        rows = (made.tokens == torch.tensor(canvas)).all(1)
        assert (made.nats_spent[rows] - spent).abs().max() < 1e-5
    if "nats" in options:
        assert float(made.nats_spent.max()) <= options["nats"] + 1e-5


def divergences(toys, total):
    """(KL(joint, law), the mean of nats spent under the joint, the total) of each toy."""
    for seed in toys:
        toy = make_toy(2, 3, seed=seed, sharpness=1 + seed % 4)
        law = budgeted(toy, total)
        p = {c: float(toy.joint[c]) for c in itertools.product(range(2), repeat=3)}
        kl = sum(q * (torch.tensor(q / law[c][0]).log()).item() for c, q in p.items() if q > 0)
        yield kl, sum(q * law[c][1] for c, q in p.items()), total


def bound_holds(toys):
    tight = 0
    for total in (0.0, 0.3, 1.0, 5.0):
        for kl, spent, most in divergences(toys, total):
            assert -1e-9 < kl <= spent + 1e-9
            assert spent <= most + 1e-9
            tight += kl > 0.3 * spent > 0.01
    return tight


def test_the_divergence_is_at_most_the_nats_spent():
    assert bound_holds(range(20)) > 0
    # Nothing is spent at one position a call, and then the law is exact.
    assert all(abs(kl) < 1e-9 and spent == 0 for kl, spent, _ in divergences(range(5), 0.0))


@pytest.mark.slow
def test_the_divergence_is_at_most_the_nats_spent_on_many_toys():
    assert bound_holds(range(1000)) > 100
