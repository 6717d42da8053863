"""The parallel rules of `confidence`: their laws, what they promise, what others got wrong."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from revising_toys import FALSE_ALARM, agrees
from sampler_runs import SPACE, finish
from toys import HashDenoiser, make_toy, uniform_denoiser

from mdiff import from_logits, sample
from mdiff.denoiser import guided
from mdiff.errors import ConfigError
from mdiff.kernels.reference import Draw
from mdiff.sampling.parallel import Bounded, divergence, factor_fits, frechet_fits
from mdiff.tokens import TokenSpace

# Conditionals of no joint: a law says most about the rule where they do not agree.
_TABLE = torch.randn(3**5, 5, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
TOY = replace(make_toy(2, 5), table=_TABLE.log_softmax(-1))
P = TOY.table.exp().tolist()


def by_prefix(fits):
    """The rule that writes the longest prefix of the surest draws that fits, one at least."""

    def choose(p, drawn, settled):
        ranked = sorted(drawn, key=lambda i: (-p[i][drawn[i]], i))
        c = [p[i][drawn[i]] for i in ranked]
        return ranked[: max([n for n in range(1, len(c) + 1) if fits(c[:n])], default=1)]

    return choose


def by_settling(value, least):
    """The rule that writes the settled draws of at least a value, or the best one."""

    def choose(p, drawn, settled):
        values = {i: value(p[i], drawn[i]) for i in drawn}
        ready = [i for i in drawn if values[i] >= least and settled[i] >= 2]
        return ready or sorted(drawn, key=lambda i: (-values[i], i))[:1]

    return choose


def nats(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def law_of(choose, *, kl=0.0, distance=nats):
    """The law over finished canvases, from the tree of paths with the last law and its calls."""
    start = ((TOY.vocab,) * TOY.length, None, (0,) * TOY.length)
    law, done = {start: 1.0}, defaultdict(float)
    while law:
        following = defaultdict(float)
        for (canvas, before, calls), chance in law.items():
            number = sum(v * 3 ** (TOY.length - 1 - i) for i, v in enumerate(canvas))
            p, hidden = P[number], [i for i, v in enumerate(canvas) if v == TOY.vocab]
            now = [0] * TOY.length
            for i in hidden if before is not None else ():
                small = kl > 0 and distance(p[i], P[before][i]) < kl
                now[i] = calls[i] + 1 if small else 0
            for tokens in itertools.product(range(TOY.vocab), repeat=len(hidden)):
                drawn = dict(zip(hidden, tokens))
                after = list(canvas)
                for i in choose(p, drawn, now):
                    after[i] = drawn[i]
                share = chance * math.prod(p[i][v] for i, v in drawn.items())
                if TOY.vocab in after:
                    memory = (number, tuple(now)) if kl else (None, calls)
                    following[tuple(after), *memory] += share
                else:
                    done[tuple(after)] += share
        law = following
    return dict(done)


def probability(p, token):
    return p[token]


def entropy(p, token):
    return sum(x * math.log(x) for x in p if x > 0)


FACTOR = by_prefix(lambda c: (len(c) + 1) * (1 - c[-1]) < 1.5)
FRECHET = by_prefix(lambda c: sum(1 - x for x in c) <= 0.8)


def last_untested(p, drawn, settled):
    """As Fast-dLLM's code: where only the last of all does not fit, it is written too."""
    chosen = FACTOR(p, drawn, settled)
    return list(drawn) if len(chosen) == len(drawn) - 1 else chosen


KLASS = by_settling(probability, 0.5)
RULES = {
    "factor": ({"factor": 1.5}, law_of(FACTOR)),
    "frechet": ({"frechet": 0.8}, law_of(FRECHET)),
    "kl": ({"threshold": 0.5, "kl": 0.15}, law_of(KLASS, kl=0.15)),
    "kl by entropy": (
        {"threshold": 0.65, "kl": 0.15, "score": "entropy"},
        law_of(by_settling(entropy, -0.65), kl=0.15),
    ),
}
MUTANTS = {
    "n instead of n + 1": (
        "factor", lambda: law_of(by_prefix(lambda c: len(c) * (1 - c[-1]) < 1.5)),
    ),
    "the last one is not tested": ("factor", lambda: law_of(last_untested)),
    "the largest left out": (
        "frechet", lambda: law_of(by_prefix(lambda c: sum(1 - x for x in c[:-1]) <= 0.8)),
    ),
    "reversed": ("kl", lambda: law_of(KLASS, kl=0.15, distance=lambda p, q: nats(q, p))),
    "without its memory": ("kl", lambda: law_of(by_prefix(lambda c: c[-1] >= 0.5))),
    "entropy with its sign lost": (
        "kl by entropy",
        lambda: law_of(by_settling(lambda p, v: -entropy(p, v), 0.65), kl=0.15),
    ),
    "entropy of one probability": (
        "kl by entropy",
        lambda: law_of(by_settling(lambda p, v: p[v] * math.log(p[v]), -0.65), kl=0.15),
    ),
}  # fmt: skip


def made_by(options, rows):
    canvas = torch.full((rows, TOY.length), TOY.vocab)
    return sample(
        TOY.denoiser(), canvas, space=TOY.space, sampler="confidence", seed=4, **options
    ).tokens


@pytest.mark.parametrize("rule", RULES)
def test_a_parallel_rule_has_its_own_enumerated_law(rule, masks):
    options, law = RULES[rule]
    tokens = made_by(options, len(masks))
    assert agrees(tokens, law, TOY) > FALSE_ALARM
    for mutant, (of, other) in MUTANTS.items():
        if of == rule:
            assert agrees(tokens, other(), TOY) < FALSE_ALARM, mutant
    plain = {name: value for name, value in options.items() if name == "score"}
    assert agrees(made_by(plain, len(masks)), law, TOY) < FALSE_ALARM


def conditional(toy, canvas, written):
    """P(the tokens at `written` | the canvas before), by the chain rule of an ideal toy."""
    canvas, chance = list(canvas), 1.0
    for i, v in written.items():
        chance *= float(toy.table[int(toy.number(torch.tensor([canvas]))), i, v].exp())
        canvas[i] = v
    return chance


def greedy_runs(seed, **options):
    """A sharp toy, every canvas of it, and the states of greedy confidence from each."""
    toy = make_toy(3, 4, seed=seed, sharpness=5)
    canvas = toy.canvas(torch.arange(len(toy.table)))
    return toy, canvas, list(finish("confidence", canvas, denoiser=toy.denoiser(), space=toy.space,
                                    temperature=0, **options))  # fmt: skip


def in_turn(toy, canvas, states):
    """Greedy tokens of one call a position, in the order in which the states revealed them."""
    when = torch.stack([state.revealed for state in states]).long()
    order = torch.where(when.any(0), when.argmax(0), len(states)).argsort(dim=1, stable=True)
    return finish("any_order", canvas, denoiser=toy.denoiser(), space=toy.space, temperature=0,
                  order=order)[-1].tokens  # fmt: skip


def test_factor_1_writes_what_greedy_calls_of_one_position_would():
    several = differ = 0
    for seed in range(6):
        toy, canvas, states = greedy_runs(seed, factor=1.0)
        assert torch.equal(in_turn(toy, canvas, states), states[-1].tokens)
        several += sum(int((state.revealed.sum(1) > 1).sum()) for state in states)
        toy, canvas, states = greedy_runs(seed, factor=2.5)
        differ += int((in_turn(toy, canvas, states) != states[-1].tokens).any(1).sum())
    assert several > 100
    assert differ > 0


def test_above_factor_1_there_is_a_joint_whose_greedy_tokens_differ():
    """Both tokens are 0 with 0.66, 3 (1 - 0.66) is just above 1, and 0 0 is not the best pair."""
    joint = torch.tensor([[0.32, 0.34], [0.34, 0.0]], dtype=torch.float64)

    def logits(tokens):
        first = torch.where((tokens[:, 1] == 2)[:, None], joint.sum(1), joint.T[tokens[:, 1] % 2])
        second = torch.where((tokens[:, 0] == 2)[:, None], joint.sum(0), joint[tokens[:, 0] % 2])
        return torch.stack([first, second], 1).log()

    found = {}
    for factor in (1.0, 1.03):
        made = sample(from_logits(logits), torch.full((1, 2), 2), space=TokenSpace(2, mask_id=2),
                      sampler="confidence", temperature=0, factor=factor)  # fmt: skip
        found[factor] = (made.tokens[0].tolist(), int(made.calls[0]))
    assert found == {1.0: ([0, 1], 2), 1.03: ([0, 0], 1)}


@pytest.mark.parametrize("most", [0.1, 0.4])
def test_frechet_bounds_the_chance_that_a_token_of_a_call_is_wrong(most):
    several = 0
    for seed in range(3):
        toy, before, states = greedy_runs(seed, frechet=most)
        for state in states:
            for row in (state.revealed.sum(1) > 1).nonzero()[:, 0].tolist():
                at = state.revealed[row].nonzero()[:, 0].tolist()
                written = {i: int(state.tokens[row, i]) for i in at}
                assert conditional(toy, before[row].tolist(), written) >= 1 - most - 1e-12
                several += 1
            before = state.tokens
    assert several > 30


def test_lists_without_repeats_are_right_where_a_bound_allows_one_uncertain_token_a_call():
    """Of n! / n^n draws at once a permutation is right, 6 of 27; a bound writes it one by one."""

    def logits(tokens):
        used = torch.nn.functional.one_hot(tokens, 4)[..., :3].sum(1)
        return torch.where(used > 0, -torch.inf, 0.0)[:, None].expand(-1, 3, -1).double()

    canvas, right = torch.full((4000, 3), 3), {}
    for name, options in (("at once", {"steps": 1}), ("factor", {"factor": 1.0}),
                          ("frechet", {"frechet": 0.4})):  # fmt: skip
        made = sample(from_logits(logits), canvas, space=TokenSpace(3, mask_id=3),
                      sampler="confidence", seed=1, **options)  # fmt: skip
        right[name] = float((made.tokens.sort(1).values == torch.arange(3)).all(1).double().mean())
        if name == "factor":
            # The last is certain, the one before it is not.
            assert (made.calls == 3).all()
    assert abs(right["at once"] - 6 / 27) < 5 * (6 / 27 * 21 / 27 / 4000) ** 0.5
    assert right["factor"] == right["frechet"] == 1


def test_the_number_of_a_bound_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(2)
    for _ in range(300):
        at = torch.rand(3, 7, generator=generator) < 0.7
        c = torch.rand(int(at.sum()), generator=generator, dtype=torch.float64) ** 0.1
        drawn = Draw(c.long(), c.log(), c, c)
        row = torch.arange(3)[:, None].expand(3, 7)[at]
        for fits, bound, definition in (
            (factor_fits, 1.5, lambda c, n: (n + 1) * (1 - c[n - 1]) < 1.5),
            (frechet_fits, 0.3, lambda c, n: sum(1 - x for x in c[:n]) <= 0.3),
        ):
            rule = Bounded(_Nothing(), fits, bound)
            expected = []
            for b in range(3):
                own = sorted(c[row == b].tolist(), reverse=True)
                expected.append(
                    max([n for n in range(len(own) + 1) if n == 0 or definition(own, n)])
                )
            assert rule.count(at, drawn, c, torch.zeros(3).long())[1].tolist() == expected


class _Nothing:
    ask = None


def test_a_divergence_has_the_same_bits_in_any_batch():
    generator = torch.Generator().manual_seed(3)
    now, before = torch.randn(2, 5, 70_001, generator=generator).log_softmax(2)
    together = divergence(now, before)
    alone = torch.cat([divergence(now[i : i + 1], before[i : i + 1]) for i in range(5)])
    turned = torch.randperm(70_001, generator=generator)
    assert torch.equal(together, alone)
    assert torch.equal(together, divergence(now[:, turned], before[:, turned]))
    exact = (now.double().exp() * (now.double() - before.double())).sum(1)
    assert (together - exact).abs().max() < 1e-5
    hidden = torch.tensor([[0.0, -torch.inf]])
    assert divergence(hidden, hidden).tolist() == [0.0]


@pytest.mark.parametrize(
    "options", [{"factor": 4.0}, {"frechet": 1.0}, {"threshold": 0.1, "kl": 2.0}], ids=str
)
def test_a_parallel_rule_runs_in_blocks_guided_and_with_counts(options):
    canvas = torch.full((4, 16), SPACE.mask_id)
    labels = {"label": torch.arange(4)}
    model = guided(HashDenoiser(SPACE), guidance_scale=3.0, without={"label": torch.tensor(0)})
    for more in ({}, {"steps": 5, "counts": "even"}, {"steps": 40}):
        whole = sample(model, canvas, space=SPACE, sampler="confidence", cond=labels, seed=1,
                       **options, **more)  # fmt: skip
        assert (whole.tokens != SPACE.mask_id).all()
        assert (whole.rounds <= 16).all()
        one = sample(model, canvas[2:3], space=SPACE, sampler="confidence", seed=torch.tensor([9]),
                     cond={"label": labels["label"][2:3]}, **options, **more)  # fmt: skip
        seeds = torch.tensor([7, 8, 9, 10])
        again = sample(model, canvas, space=SPACE, sampler="confidence", seed=seeds, cond=labels,
                       **options, **more)  # fmt: skip
        assert torch.equal(one.tokens[0], again.tokens[2])
        assert one.calls[0] == again.calls[2]
    blocks = sample(model, canvas, space=SPACE, sampler="confidence", block_length=4, cond=labels,
                    **options)  # fmt: skip
    assert (blocks.tokens != SPACE.mask_id).all()


@pytest.mark.parametrize(("options", "says"), [
    ({"factor": 0.0}, "factor=0.0: expected a finite number above 0"),
    ({"factor": math.nan}, "factor=nan"), ({"factor": math.inf}, "factor=inf"),
    ({"frechet": -0.1}, "frechet=-0.1: expected a chance of error, 0 to 1"),
    ({"frechet": 1.5}, "frechet=1.5"), ({"frechet": math.nan}, "frechet=nan"),
    ({"kl": 0.01}, r"kl=0.01: give the threshold .*threshold=0.9"),
    ({"kl": 0.0, "threshold": 0.9}, "kl=0.0: expected nats"),
    ({"kl": math.nan, "threshold": 0.9}, "kl=nan"),
    ({"factor": 1.0, "frechet": 0.1}, "factor=1.0 and frechet=0.1: give one"),
    ({"factor": 1.0, "threshold": 0.9}, "threshold=0.9 and factor=1.0: give one"),
    ({"frechet": 0.1, "threshold": 0.9}, "give one"), ({"factor": 1.0, "kl": 0.1}, "give one"),
    ({"factor": 1.0, "kl": 0.1, "threshold": 0.9}, "give one"),
    ({"threshold": 0.9, "noise": 1.0}, "threshold=0.9 and noise"),
    ({"factor": 1.0, "noise": 1.0}, "noise"), ({"frechet": 0.1, "noise": 1.0}, "noise"),
    ({"kl": 0.1, "threshold": 0.9, "noise": 1.0}, "noise"),
    ({"factor": 1.0, "score": "entropy"}, "factor=1.0: .*score='entropy'"),
    ({"frechet": 0.1, "score": "margin"}, "frechet=0.1: .*score='margin'"),
])  # fmt: skip
def test_bounds_that_are_out_of_range_or_contradict_are_refused_in_one_line(options, says):
    model = HashDenoiser(SPACE)
    with pytest.raises(ConfigError, match=says) as error:
        finish("confidence", torch.full((2, 4), 5), denoiser=model, **options)
    assert "\n" not in str(error.value)
    assert model.calls == 0


# What others' code got wrong, where a sampler here could.


@pytest.mark.parametrize("name", ["confidence", "any_order"])
def test_the_remainder_of_the_steps_is_written_unlike_lmdeploys_static_rule(name):
    canvas = torch.full((2, 10), SPACE.mask_id)
    canvas[1, 3:] = 1
    states = finish(name, canvas, steps=4, counts="even")
    assert [state.revealed.sum(1).tolist() for state in states] == [[3, 1], [3, 1], [2, 1], [2, 0]]
    assert 4 * (10 // 4) < 10  # what a rule of block // steps tokens a step would have written


def test_the_count_is_each_samples_own_unlike_titoks_of_row_0():
    canvas = torch.full((3, 8), SPACE.mask_id)
    canvas[0, 2:], canvas[1, 5:] = 1, 1
    states = finish("confidence", canvas, steps=2, counts="even")
    assert [state.revealed.sum(1).tolist() for state in states] == [[1, 3, 4], [1, 2, 4]]


@pytest.mark.parametrize("score", ["confidence", "entropy", "margin"])
def test_tied_scores_write_as_many_as_asked_unlike_meissonics_strict_comparison(score):
    canvas = torch.full((3, 9), SPACE.mask_id)
    states = finish("confidence", canvas, denoiser=uniform_denoiser(SPACE), score=score, steps=3,
                    counts="even", temperature=0)  # fmt: skip
    assert [state.revealed.sum(1).tolist() for state in states] == [[3] * 3] * 3
    # Ties go to the first position.
    assert states[0].revealed[:, :3].all()


def test_a_score_is_of_the_law_and_not_of_raw_logits_unlike_titoks():
    """A constant added to the logits of a position changes no law, and so no sample."""
    shift = torch.tensor([0.0, 9.0, -7.0, 3.0, 0.5])[:, None]
    moved = from_logits(lambda tokens: TOY.table[TOY.number(tokens)] + shift)
    canvas = torch.full((200, TOY.length), TOY.vocab)
    for options in ({"noise": 2.0, "steps": 3}, {"factor": 1.5}, {"threshold": 0.6, "kl": 0.3}):
        made = [sample(model, canvas, space=TOY.space, sampler="confidence", seed=1, **options)
                for model in (TOY.denoiser(), moved)]  # fmt: skip
        assert torch.equal(made[0].tokens, made[1].tokens)
