"""What others run: each has the law of softmax, keeps what is given, and calls as it says."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mdiff.denoiser import from_logits
from mdiff.evaluation.bench.baselines import amused_step, mdlm_sampler, mdlm_step
from mdiff.evaluation.bench.laws import MDLM, OURS, Case, law, law_case, laws, make_case, sides
from mdiff.ops import BACKENDS

# the law of the sides


def test_every_side_that_runs_here_draws_from_softmax_and_keeps_given_tokens() -> None:
    """False alarm 1e-6 a side."""
    found, _ = sides()
    checked = laws(found)
    assert set(OURS) & set(BACKENDS) <= set(checked)
    assert [each.name for each in checked.values() if not each.passed] == []


@pytest.mark.parametrize("mutant", ["too warm", "given drawn again", "mask too often", "maximum"])
def test_a_side_with_another_law_is_reported_as_failing(mutant: str) -> None:
    def too_warm(case: Case) -> Tensor:
        drawn = torch.multinomial((case.logits / 1.1).softmax(1), 1)[:, 0]
        return torch.where(case.hidden, drawn, case.tokens)

    def mask_too_often(case: Case) -> Tensor:
        return mdlm_step(case.logits, case.tokens, mask_id=case.mask_id, t=case.t, s=0.45)

    wrong = {
        "too warm": ("LLaDA", too_warm),
        "given drawn again": (
            "LLaDA", lambda case: torch.multinomial(case.logits.softmax(1), 1)[:, 0],
        ),
        "mask too often": (MDLM, mask_too_often),
        "maximum": ("LLaDA", lambda c: torch.where(c.hidden, c.logits.argmax(1), c.tokens)),
    }  # fmt: skip
    assert not law(*wrong[mutant], law_case()).passed


def test_both_sides_get_the_same_logits_and_half_of_the_rows_is_hidden() -> None:
    case = make_case(10, 6, dtype=torch.float32)
    assert int(case.hidden.sum()) == 5
    assert torch.equal(case.requested, case.logits[case.hidden])
    assert torch.isneginf(case.logits[:, case.mask_id]).all()
    assert (case.tokens[~case.hidden] < case.mask_id).all()


def test_amused_hides_the_least_confident_positions_again() -> None:
    case = make_case(40, 30, dtype=torch.float32)
    # At ratio 0.8 the cosine keeps floor(40 cos(0.4 pi)) = 12 positions hidden.
    step = partial(amused_step, mask_id=case.mask_id, ratio=0.8, temperature=0.0)
    torch.manual_seed(0)
    after, drawn = step(case.logits, case.tokens)
    p = case.logits.softmax(1).gather(1, drawn[:, None])[:, 0]
    hidden = after == case.mask_id
    assert int(hidden.sum()) == 12
    assert not (hidden & ~case.hidden).any()
    assert p[hidden].max() <= p[case.hidden & ~hidden].min()


# the baselines' samplers


@pytest.mark.parametrize("cached", [False, True])
def test_a_baseline_fills_the_canvas_and_the_cache_saves_calls_where_nothing_changed(
    cached: bool,
) -> None:
    mask = 6
    calls = 0

    def logits(tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros(*tokens.shape, mask + 1)

    canvas = torch.full((1, 5), mask)
    canvas[0, 2] = 3
    torch.manual_seed(0)
    times = torch.linspace(1, 0, 101).tolist()
    found = list(
        mdlm_sampler(
            from_logits(logits), canvas, mask_id=mask, times=times, dtype=torch.float64,
            cached=cached,
        )
    )  # fmt: skip
    states = [canvas, *(tokens for tokens, _ in found)]
    assert len(found) == 100
    assert (states[-1] != mask).all()
    assert all(tokens[0, 2] == 3 for tokens in states)
    changed = [not torch.equal(a, b) for a, b in pairwise(states)]
    # The first step calls; after it a step calls where the one before changed something.
    expected = [True, *changed[:-1]] if cached else [True] * 100
    assert [called for _, called in found] == expected
    assert calls == sum(expected)
