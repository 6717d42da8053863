"""Samplers against their own laws, enumerated over the (V + 1)^L canvases of a toy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from toys import make_toy

from mdiff.find import find
from mdiff.kernels import philox
from mdiff.samplers.any_order import any_order
from mdiff.samplers.confidence import confidence
from mdiff.samplers.first_hitting import first_hitting
from mdiff.sampling import reveal_counts
from mdiff.schedule import Cosine, Linear, Polynomial

SAMPLES = 200_000
FALSE_ALARM = 1e-6 / 48  # family-wise 1e-6 over at most 48 statistical tests in this file
TOY = make_toy()
FINAL = torch.arange(TOY.vocab**TOY.length)  # the canvases without a mask, in base V


def run(name, *, samples=SAMPLES, seed=1, **options):
    canvas = torch.full((samples, TOY.length), TOY.vocab)
    sampler = name if callable(name) else find("samplers", name)
    *_, last = sampler(TOY.denoiser(), canvas, space=TOY.space, seed=seed, **options)
    return last.tokens


def chi_square(tokens, law):
    """The p-value of samples (N, L) under `law` (V^L,); cells expected below 5 are pooled."""
    base = TOY.vocab ** torch.arange(TOY.length - 1, -1, -1)
    found = torch.bincount((tokens * base).sum(1), minlength=len(law)).double()
    expected = law * len(tokens)
    rare = expected < 5
    if rare.any():
        found = torch.cat([found[~rare], found[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    if found[~keep].sum() > 0:
        return 0.0
    statistic = ((found - expected)[keep] ** 2 / expected[keep]).sum()
    return float(stats.chi2.sf(float(statistic), int(keep.sum()) - 1))


def joint():
    return TOY.joint.flatten()


def final_law(distribution):
    """The law over finished canvases from one over all canvases."""
    base = (TOY.vocab + 1) ** torch.arange(TOY.length - 1, -1, -1)
    digits = FINAL[:, None] // TOY.vocab ** torch.arange(TOY.length - 1, -1, -1) % TOY.vocab
    law = distribution[(digits * base).sum(1)]
    assert abs(float(law.sum()) - 1) < 1e-9
    return law


def start():
    distribution = torch.zeros(len(TOY.table), dtype=torch.float64)
    distribution[-1] = 1  # every digit is the mask
    return distribution


def positions():
    """Per canvas and position: probabilities of each token, and whether the position is hidden."""
    canvases = TOY.canvas(torch.arange(len(TOY.table)))
    return canvases, TOY.table.exp(), canvases == TOY.vocab


def step_matrix(reveal):
    """Transitions (states, states) where hidden positions are revealed independently.

    `reveal` (states, L) is the probability that a hidden position is revealed.
    """
    canvases, p, hidden = positions()
    digit = torch.nn.functional.one_hot(canvases, TOY.vocab + 1).double()
    opened = torch.cat([reveal[..., None] * p, 1 - reveal[..., None]], 2)
    each = torch.where(hidden[..., None], opened, digit)
    return torch.einsum("na,nb,nc,nd->nabcd", *each.unbind(1)).flatten(1)


def ancestral_law(steps, schedule):
    times = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    m = schedule.mask_prob(times)
    distribution = start()
    for before, after in itertools.pairwise(m.tolist()):
        reveal = torch.full((len(TOY.table), TOY.length), (before - after) / before)
        distribution = distribution @ step_matrix(reveal.double())
    return final_law(distribution)


def subset_law(choose, counts):
    """The law where `choose(step, canvas, drawn, count)` gives [(probability, positions)].

    Every hidden position draws a token; the chosen positions keep theirs.
    """
    distribution = start()
    for step, count in enumerate(counts):
        following = torch.zeros_like(distribution)
        for number in distribution.nonzero()[:, 0].tolist():
            canvas = TOY.canvas(torch.tensor([number]))[0].tolist()
            hidden = [i for i, token in enumerate(canvas) if token == TOY.vocab]
            p = TOY.table[number].exp()
            for drawn in itertools.product(range(TOY.vocab), repeat=len(hidden)):
                chance = float(distribution[number])
                for position, token in zip(hidden, drawn):
                    chance *= float(p[position, token])
                for share, kept in choose(step, number, dict(zip(hidden, drawn)), count):
                    after = list(canvas)
                    for position in kept:
                        after[position] = drawn[hidden.index(position)]
                    following[int(TOY.number(torch.tensor([after]))[0])] += chance * share
        distribution = following
    return final_law(distribution)


def uniform_subsets(step, number, drawn, count):
    subsets = list(itertools.combinations(drawn, count))
    return [(1 / len(subsets), subset) for subset in subsets]


def maskgit_rule(noise):
    """Top positions by log p + noise[step] * Gumbel: Plackett-Luce with weights p^(1 / noise)."""

    def choose(step, number, drawn, count):
        score = {i: float(TOY.table[number, i, token]) for i, token in drawn.items()}
        if noise[step] == 0:
            return [(1.0, sorted(score, key=lambda i: (-score[i], i))[:count])]
        weight = {i: math.exp(s / noise[step]) for i, s in score.items()}
        shares = []
        for ordered in itertools.permutations(weight, count):
            share, left = 1.0, sum(weight.values())
            for position in ordered:
                share *= weight[position] / left
                left -= weight[position]
            shares.append((share, ordered))
        return shares

    return choose


def threshold_rule(score, threshold):
    """The `count` positions of the highest score, and all whose score reaches the threshold."""
    p = TOY.table.exp()
    two = p.topk(2, dim=2).values
    scores = {
        "margin": two[..., 0] - two[..., 1],
        # At most so many nats.
        "entropy": (p * TOY.table.where(p > 0, 0.0)).sum(2),
    }
    least = -threshold if score == "entropy" else threshold

    def choose(step, number, drawn, count):
        value = {
            i: float(p[number, i, token] if score == "confidence" else scores[score][number, i])
            for i, token in drawn.items()
        }
        ranked = sorted(value, key=lambda i: (-value[i], i))
        return [(1.0, [i for rank, i in enumerate(ranked) if rank < count or value[i] >= least])]

    return choose


EXACT = {
    "first_hitting": ("first_hitting", {}),
    "first_hitting, cosine": ("first_hitting", {"schedule": Cosine()}),
    "left to right": ("any_order", {"order": "left_to_right"}),
    "right to left": ("any_order", {"order": "right_to_left"}),
    "random order": ("any_order", {"order": "random"}),
    "given order": ("any_order", {"order": torch.tensor([2, 0, 3, 1])}),
    "halton": ("halton", {"grid": (2, 2)}),
    "halton, rolled": ("halton", {"roll": True}),
    "entropy": ("confidence", {"score": "entropy"}),
    "margin": ("confidence", {"score": "margin"}),
    "blocks": ("blocks", {"block_length": 3}),
    "blocks of entropy": ("blocks", {"block_length": 2, "inner": confidence, "score": "entropy"}),
}


@pytest.mark.parametrize("case", EXACT)
def test_one_reveal_a_call_gives_the_exact_joint(case):
    name, options = EXACT[case]
    assert chi_square(run(name, **options), joint()) > FALSE_ALARM


@pytest.mark.parametrize("steps", [1, 4, 64])
@pytest.mark.parametrize("schedule", [Linear(), Polynomial(2.0)], ids=str)
def test_ancestral_has_its_own_enumerated_law(steps, schedule):
    law = ancestral_law(steps, schedule)
    assert chi_square(run("ancestral", steps=steps, schedule=schedule), law) > FALSE_ALARM


def test_ancestral_at_one_step_is_rejected_against_the_joint():
    assert chi_square(run("ancestral", steps=1), joint()) < FALSE_ALARM


def test_two_reveals_a_call_have_their_own_enumerated_law():
    law = subset_law(uniform_subsets, [2, 2])
    assert chi_square(run("first_hitting", per_call=2), law) > FALSE_ALARM


@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_maskgits_rule_has_its_own_enumerated_law(noise):
    law = subset_law(maskgit_rule([noise * 0.5, 0.0]), [2, 2])
    tokens = run("confidence", steps=2, counts="even", noise=noise)
    assert chi_square(tokens, law) > FALSE_ALARM
    assert chi_square(tokens, joint()) < FALSE_ALARM


@pytest.mark.parametrize(
    ("score", "threshold", "steps", "counts"),
    [
        ("confidence", 0.6, None, [1, 1, 1, 1]),
        ("confidence", 0.4, 3, [2, 1, 1]),
        ("margin", 0.3, None, [1, 1, 1, 1]),
        ("entropy", 0.9, None, [1, 1, 1, 1]),
    ],
)
def test_a_threshold_has_its_own_enumerated_law(score, threshold, steps, counts):
    law = subset_law(threshold_rule(score, threshold), counts)
    options = {"score": score, "steps": steps, "counts": "even"}
    assert chi_square(run("confidence", threshold=threshold, **options), law) > FALSE_ALARM
    # Without a threshold, and with a lower one, the law is another.
    assert chi_square(run("confidence", **options), law) < FALSE_ALARM
    assert chi_square(run("confidence", threshold=threshold * 0.7, **options), law) < FALSE_ALARM


def reveal_times_and_order(sampler):
    """The m of each of the four hits (N, 4), and the position of each hit (N, 4)."""
    canvas = torch.full((SAMPLES // 4, TOY.length), TOY.vocab)
    states = list(sampler(TOY.denoiser(), canvas, space=TOY.space, seed=3))
    return (
        torch.stack([s.t for s in states], 1),
        torch.stack([s.revealed.long().argmax(1) for s in states], 1),
    )


def times_p_value(times):
    """Kolmogorov-Smirnov of (m(next) / m(t))^n, which is uniform at each hit."""
    before = torch.cat([torch.ones(len(times), 1, dtype=times.dtype), times[:, :-1]], 1)
    n = torch.arange(TOY.length, 0, -1)
    return float(stats.kstest(((times / before) ** n).flatten().numpy(), "uniform").pvalue)


def test_hitting_times_are_those_of_the_largest_of_n_uniforms():
    times, _ = reveal_times_and_order(first_hitting)
    assert times_p_value(times) > FALSE_ALARM


def test_the_order_of_reveal_is_uniform_over_all_permutations():
    _, order = reveal_times_and_order(first_hitting)
    code = (order * 4 ** torch.arange(3, -1, -1)).sum(1)
    found = torch.tensor([int((code == c).sum()) for c in code.unique()])
    assert len(found) == 24
    assert stats.chisquare(found.numpy()).pvalue > FALSE_ALARM


# Mutants: each is a plausible mistake, and the tests above must reject it.


def test_a_mutant_with_the_time_law_of_the_next_step_is_rejected():
    def mutant(denoiser, canvas, *, space, seed):
        for state in first_hitting(denoiser, canvas, space=space, seed=seed):
            left = (state.tokens == space.mask_id).sum(1) + 1
            object.__setattr__(state, "t", state.t ** (left / (left - 1).clamp(min=1)))
            yield state

    times, _ = reveal_times_and_order(mutant)
    assert times_p_value(times) < FALSE_ALARM


def test_a_mutant_that_redraws_a_committed_token_is_rejected():
    def mutant(denoiser, canvas, *, space, seed):
        *_, last = first_hitting(denoiser, canvas, space=space, seed=seed)
        again = torch.cat([torch.full((len(canvas), 1), TOY.vocab), last.tokens[:, 1:]], 1)
        again[:, 1] = TOY.vocab
        yield from any_order(denoiser, again, space=space, seed=seed + 1, steps=1)

    assert chi_square(run(mutant), joint()) < FALSE_ALARM


def test_a_mutant_that_scores_confidence_after_temperature_is_rejected():
    """At temperature 0.3 the position is the surest draw of the model, not of the sharpened law."""

    def law_of(measure):
        return run(
            "confidence", steps=2, counts="even", temperature=0.3, score="entropy", measure=measure
        )

    sharpened = subset_law_of_entropy(0.3)
    assert chi_square(law_of("model"), sharpened) > FALSE_ALARM
    assert chi_square(law_of("drawn"), sharpened) < FALSE_ALARM


def subset_law_of_entropy(temperature):
    """Two steps of two positions: lowest entropy at temperature 1, tokens drawn after it."""
    distribution = start()
    canvases, p, _ = positions()
    entropy = -(p * TOY.table.where(p > 0, 0.0)).sum(2)
    sharp = (TOY.table / temperature).softmax(2)
    for _ in range(2):
        following = torch.zeros_like(distribution)
        for number in distribution.nonzero()[:, 0].tolist():
            canvas = canvases[number].tolist()
            hidden = [i for i, token in enumerate(canvas) if token == TOY.vocab]
            kept = sorted(hidden, key=lambda i: (float(entropy[number, i]), i))[:2]
            for drawn in itertools.product(range(TOY.vocab), repeat=len(kept)):
                after, chance = list(canvas), float(distribution[number])
                for position, token in zip(kept, drawn):
                    after[position] = token
                    chance *= float(sharp[number, position, token])
                following[int(TOY.number(torch.tensor([after]))[0])] += chance
        distribution = following
    return final_law(distribution)


def revealed_a_step():
    """The reveals of each sample at each of two even steps, (2, B), of 4, 2 and 3 hidden ones."""
    canvas = torch.tensor([[4, 4, 4, 4], [1, 4, 4, 0], [4, 4, 4, 2]])
    states = confidence(TOY.denoiser(), canvas, space=TOY.space, steps=2, counts="even")
    return [state.revealed.sum(1).tolist() for state in states]


def test_a_mutant_that_counts_by_the_batch_is_rejected(monkeypatch):
    own = [[2, 1, 2], [2, 1, 1]]
    assert revealed_a_step() == own

    def by_batch(counts, hidden, **options):
        """The table of the row that hides most, for all rows."""
        return reveal_counts(counts, hidden.max().expand(len(hidden)), **options)

    monkeypatch.setattr("mdiff.samplers.confidence.reveal_counts", by_batch)
    assert revealed_a_step() != own


def test_streams_of_different_purposes_and_samples_do_not_correlate():
    n = 20_000
    index = torch.arange(n)
    a = philox.uniform(5, 0, index, 0, purpose=philox.TIME)
    b = philox.uniform(5, 0, index, 0, purpose=philox.ORDER)
    c = philox.uniform(5, 0, index + 1, 0, purpose=philox.TIME)
    for other in (b, c):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 5 / n**0.5
