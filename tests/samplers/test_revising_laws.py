"""Path planning, edit and gibbs against their own laws, enumerated."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch
from revising_toys import FALSE_ALARM, IDEAL, LENGTH, MASK, TABLE, agrees, draws, p_of, run


def planned(steps, score, kept):
    """The law of path planning: {canvas: probability}."""
    law = {(MASK,) * LENGTH: 1.0}
    for step in range(steps):
        following = defaultdict(float)
        left = (1 - kept) * (steps - 1 - step) / steps
        count = LENGTH - int(LENGTH * left + 1e-9)
        for canvas, chance in law.items():
            p = p_of(canvas)
            for share, drawn in draws(canvas, range(LENGTH)):
                value = [
                    p[i][canvas[i] if score == "standing" and canvas[i] != MASK else drawn[i]]
                    for i in range(LENGTH)
                ]
                best = sorted(range(LENGTH), key=lambda i: (-value[i], i))[:count]
                after = [MASK] * LENGTH
                for i in best:
                    after[i] = drawn[i] if canvas[i] == MASK else canvas[i]
                following[tuple(after)] += chance * share
        law = following
    return dict(law)


@pytest.mark.parametrize("kept", [0.0, 0.2])
@pytest.mark.parametrize("score", ["standing", "drawn"])
def test_path_planning_has_its_own_enumerated_law(score, kept, masks):
    law = planned(4, score, kept)
    made = run("path_planning", masks, steps=4, score=score, kept=kept)
    assert agrees(made.tokens, law) > FALSE_ALARM
    swapped = {"standing": "drawn", "drawn": "standing"}[score]
    other = run("path_planning", masks, steps=4, score=swapped, kept=kept)
    assert agrees(other.tokens, law) < FALSE_ALARM


def edited(threshold, edit_threshold, least, rounds_after):
    """The law of `edit` over finished canvases, with the calls after the last mask as memory."""
    law, done = {((MASK,) * LENGTH, 0): 1.0}, defaultdict(float)
    while law:
        following = defaultdict(float)
        for (canvas, after), chance in law.items():
            p = p_of(canvas)
            hidden = [i for i in range(LENGTH) if canvas[i] == MASK]
            for share, drawn in draws(canvas, range(LENGTH)):
                sure = [i for i in hidden if p[i][drawn[i]] > threshold]
                if len(sure) < least:
                    sure = sorted(hidden, key=lambda i: (-p[i][drawn[i]], i))[:least]
                changed = [
                    i for i in range(LENGTH)
                    if i not in hidden and drawn[i] != canvas[i] and p[i][drawn[i]] > edit_threshold
                ]  # fmt: skip
                now = list(canvas)
                for i in (*sure, *changed):
                    now[i] = drawn[i]
                later = after + (not hidden)
                full = MASK not in now
                if (not hidden and not changed) or (full and later >= rounds_after):
                    done[tuple(now)] += chance * share
                else:
                    following[tuple(now), later] += chance * share
        law = following
    return dict(done)


@pytest.mark.parametrize("setting", [(0.5, 0.4, 1, 4), (0.3, 0.6, 2, 2), (1.5, 0.3, 1, 3),
                                     (0.4, 1.5, 1, 16)], ids=str)  # fmt: skip
def test_edit_has_its_own_enumerated_law(setting, masks):
    threshold, edit_threshold, least, rounds_after = setting
    made = run("edit", masks, threshold=threshold, edit_threshold=edit_threshold, least=least,
               rounds_after=rounds_after)  # fmt: skip
    assert agrees(made.tokens, edited(*setting)) > FALSE_ALARM
    assert int(made.calls.max()) <= LENGTH + rounds_after


def gibbs_matrix(table, choose):
    """The transitions of one move over finished canvases; `choose` gives [(chance, positions)]."""
    finished = list(itertools.product(range(MASK), repeat=LENGTH))
    number = {canvas: n for n, canvas in enumerate(finished)}
    matrix = torch.zeros(len(finished), len(finished), dtype=torch.float64)
    for canvas in finished:
        for chance, positions in choose(canvas, table):
            hidden = tuple(MASK if i in positions else v for i, v in enumerate(canvas))
            for share, drawn in draws(hidden, positions, table):
                after = tuple(drawn.get(i, v) for i, v in enumerate(canvas))
                matrix[number[canvas], number[after]] += chance * share
    return finished, matrix


def one_at_random(canvas, table):
    return [(1 / LENGTH, [i]) for i in range(LENGTH)]


def two_at_once(canvas, table):
    pairs = list(itertools.combinations(range(LENGTH), 2))
    return [(1 / len(pairs), list(pair)) for pair in pairs]


def smallest_margin(canvas, table):
    margins = []
    for i in range(LENGTH):
        hidden = tuple(MASK if j == i else v for j, v in enumerate(canvas))
        best = sorted(p_of(hidden, table)[i], reverse=True)
        margins.append(best[0] - best[1])
    return [(1.0, [margins.index(min(margins))])]


def test_gibbs_keeps_the_joint_and_its_relatives_do_not():
    p = IDEAL.joint.flatten()
    moved = {
        rule.__name__: float((p @ gibbs_matrix(IDEAL.table, rule)[1] - p).abs().sum() / 2)
        for rule in (one_at_random, two_at_once, smallest_margin)
    }
    assert moved["one_at_random"] < 1e-12
    assert moved["two_at_once"] > 0.01
    assert moved["smallest_margin"] > 0.01


def test_gibbs_has_its_own_enumerated_law_from_a_finished_canvas(masks):
    finished, matrix = gibbs_matrix(TABLE, one_at_random)
    begin = (2, 0, 1)
    law = torch.zeros(len(finished), dtype=torch.float64)
    law[finished.index(begin)] = 1
    law = law @ torch.linalg.matrix_power(matrix, 2 * LENGTH)
    canvas = torch.tensor([begin]).repeat(len(masks), 1)
    given = torch.zeros_like(canvas, dtype=torch.bool)
    made = run("gibbs", canvas, given=given, sweeps=2)
    assert agrees(made.tokens, dict(zip(finished, law.tolist()))) > FALSE_ALARM
    assert (made.calls == 2 * LENGTH).all()
    one = run("gibbs", canvas, given=given, sweeps=1)
    assert agrees(one.tokens, dict(zip(finished, law.tolist()))) < FALSE_ALARM


def test_gibbs_from_masks_begins_with_the_exact_law_and_keeps_it(masks):
    law = dict(zip(itertools.product(range(MASK), repeat=LENGTH), IDEAL.joint.flatten().tolist()))
    made = run("gibbs", masks, table=IDEAL.table, sweeps=1)
    assert agrees(made.tokens, law) > FALSE_ALARM
    assert (made.calls == 2 * LENGTH).all()
