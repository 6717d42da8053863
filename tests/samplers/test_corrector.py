"""The corrector of first hitting: its own law, how near it is to the joint, and what it costs."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import pytest
import torch
from revising_toys import FALSE_ALARM, IDEAL, agrees, run
from sampler_runs import SPACE, finish
from toys import HashDenoiser, make_toy

from mdiff.errors import ConfigError


def corrected(toy, per_call, corrector, most_certain=False):
    """The law of first hitting with its corrector, over all orders; and the most calls."""
    p, length, mask = toy.table.exp().tolist(), toy.length, toy.vocab
    done, calls = defaultdict(float), 0
    orders = list(itertools.permutations(range(length)))
    for order in orders:
        groups = [order[i : i + per_call] for i in range(0, length, per_call)]
        law = {((mask,) * length, ()): 1 / len(orders)}
        for call, new in enumerate([*groups, ()]):
            following = defaultdict(float)
            for (canvas, again), chance in law.items():
                at = sorted([*new, *again])
                calls = max(calls, call + 1) if at else calls
                shown = [mask if i in at else v for i, v in enumerate(canvas)]
                row = p[sum(v * (mask + 1) ** (length - 1 - i) for i, v in enumerate(shown))]
                entropy = {i: -sum(x * math.log(x) for x in row[i]) for i in at}
                sign = 1 if most_certain else -1
                ranked = sorted(at, key=lambda i: (sign * entropy[i], i))
                redrawn = tuple(ranked[: min(corrector, len(at) - 1)] if new else ())
                for tokens in itertools.product(range(mask), repeat=len(at)):
                    after = list(shown)
                    for i, v in zip(at, tokens):
                        after[i] = v
                    share = math.prod(row[i][v] for i, v in zip(at, tokens))
                    following[tuple(after), redrawn] += chance * share
            law = following
        for (canvas, _), chance in law.items():
            done[canvas] += chance
    return dict(done), calls


@pytest.mark.parametrize(("per_call", "corrector"), [(2, 1), (3, 1), (3, 2)])
def test_the_corrector_has_its_own_enumerated_law(per_call, corrector, masks):
    law, calls = corrected(IDEAL, per_call, corrector)
    made = run("first_hitting", masks, table=IDEAL.table, per_call=per_call, corrector=corrector)
    assert agrees(made.tokens, law) > FALSE_ALARM
    assert int(made.calls.max()) == calls == -(-3 // per_call) + 1
    assert not made.log_prob_is_exact
    plain = run("first_hitting", masks, table=IDEAL.table, per_call=per_call)
    assert agrees(plain.tokens, law) < FALSE_ALARM
    if (per_call, corrector) == (3, 1):
        mutant, _ = corrected(IDEAL, per_call, corrector, most_certain=True)
        assert agrees(made.tokens, mutant) < FALSE_ALARM


def distance(toy, law):
    return sum(abs(float(toy.joint[canvas]) - chance) for canvas, chance in law.items()) / 2


def test_the_corrector_is_nearer_to_the_joint_than_none():
    for per_call, most in ((2, 0.9), (3, 0.5)):
        with_one, without = 0.0, 0.0
        for seed in range(8):
            toy = make_toy(2, 4, seed=seed, sharpness=1 + seed % 2)
            with_one += distance(toy, corrected(toy, per_call, 1)[0])
            without += distance(toy, corrected(toy, per_call, 0)[0])
        assert with_one < most * without


def test_without_a_corrector_and_at_one_a_call_nothing_changes():
    canvas = torch.full((5, 9), SPACE.mask_id)
    for options in ({"per_call": 4, "corrector": 0}, {"per_call": 1, "corrector": 3}):
        plain = {**options, "corrector": 0}
        for one, two in zip(
            finish("first_hitting", canvas, **options), finish("first_hitting", canvas, **plain),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(one.tokens, two.tokens)
            assert torch.equal(one.log_prob, two.log_prob)
            assert one.log_prob_is_exact


def test_what_is_drawn_again_is_of_the_call_before_and_the_calls_are_bounded():
    canvas = torch.full((40, 10), SPACE.mask_id)
    canvas[:, 2] = 7
    before = torch.zeros_like(canvas, dtype=torch.bool)
    written = before
    states = finish("first_hitting", canvas, per_call=3, corrector=2)
    for state in states:
        again = state.revealed & written
        assert (again <= before).all()
        assert (state.rewritten <= again).all()
        assert not state.hidden_again.any()
        assert (state.tokens[:, 2] == 7).all()
        before, written = state.revealed, written | state.revealed
    assert (states[-1].calls == 4).all()
    assert any(state.rewritten.any() for state in states)


def test_a_corrector_below_0_is_refused():
    model = HashDenoiser(SPACE)
    with pytest.raises(ConfigError, match="corrector=-1"):
        finish("first_hitting", torch.full((1, 4), 5), denoiser=model, corrector=-1)
    assert model.calls == 0
