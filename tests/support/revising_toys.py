"""Toys of samplers that take tokens back, and the chi-square test of samples against a law."""

from __future__ import annotations

import itertools

import torch
from scipy import stats
from toys import make_toy

from mdiff import from_logits, sample

FALSE_ALARM = 1e-6 / 64  # family-wise 1e-6 over at most 64 statistical tests in this file
IDEAL = make_toy(3, 3, seed=5)
# The same canvases with conditionals of no joint: a written token is not certain to stand.
generator = torch.Generator().manual_seed(6)
TABLE = torch.randn(IDEAL.table.shape, generator=generator, dtype=torch.float64).log_softmax(-1)
MASK, LENGTH = IDEAL.vocab, IDEAL.length


def denoiser(table=TABLE):
    return from_logits(lambda tokens: table[IDEAL.number(tokens)])


def run(name, canvas, *, table=TABLE, **options):
    return sample(denoiser(table), canvas, space=IDEAL.space, sampler=name, seed=3, **options)


def agrees(tokens, law, toy=IDEAL):
    """The p-value of samples (N, L) under `law`, {canvas: probability}; rare ones are pooled."""
    assert abs(sum(law.values()) - 1) < 1e-9
    number = toy.number(tokens)
    found = torch.bincount(number, minlength=len(toy.table)).double()
    expected = torch.zeros_like(found)
    for canvas, chance in law.items():
        expected[int(toy.number(torch.tensor([canvas])))] += chance * len(tokens)
    if found[expected == 0].sum() > 0:
        return 0.0
    rare = (expected < 5) & (expected > 0)
    found = torch.cat([found[expected >= 5], found[rare].sum()[None]])
    expected = torch.cat([expected[expected >= 5], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(float(statistic), int(keep.sum()) - 1))


def p_of(canvas, table=TABLE):
    return table[int(IDEAL.number(torch.tensor([canvas])))].exp().tolist()


def draws(canvas, positions, table=TABLE):
    """[(probability, {position: token})] of independent draws at the positions."""
    p = p_of(canvas, table)
    for tokens in itertools.product(range(MASK), repeat=len(positions)):
        chance = 1.0
        for position, token in zip(positions, tokens):
            chance *= p[position][token]
        yield chance, dict(zip(positions, tokens))
