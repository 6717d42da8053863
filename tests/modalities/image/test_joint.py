"""Joint modelling on a canvas of parts: any part given, any part drawn, by exact conditionals.

The world is small enough to write down: digits of 2 x 3 table_of with a noisy cell now and then,
their label, and a name of two letters whose second one says how dark the digit is. Parts have
ids of their own, one after the other.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from scipy import stats

from mdiff.denoiser import from_logits
from mdiff.find import find
from mdiff.objective.bound import nll_bound
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace

GLYPHS = {0: "11 11 11", 1: "01 01 01", 2: "11 01 01"}  # a nought, a one and a seven
GRID, LABEL, NAME = slice(0, 6), slice(6, 7), slice(7, 9)
PARTS = {"grid": GRID, "label": LABEL, "name": NAME}
SPACE = TokenSpace(7, mask_id=7, parts=((6, 0, 2), (1, 2, 5), (2, 5, 7)))
FLIP, MISNAMED = 0.15, 0.1
SUBSETS = [given for given in product([False, True], repeat=3) if not all(given)]
SAMPLES = 12_000
FALSE_ALARM = 1e-6 / 64  # family-wise 1e-6 over at most 64 statistical tests in this file
EXACT = {
    "first_hitting": ("first_hitting", {}),
    "left_to_right": ("any_order", {}),
    "random order": ("any_order", {"order": "random"}),
    "halton": ("halton", {"grid": (3, 2)}),
    "entropy": ("confidence", {"score": "entropy"}),
    "margin": ("confidence", {"score": "margin"}),
}


@cache
def world():
    """All canvases (S, L) and their probabilities (S,)."""
    canvases, chances = [], []
    for table_of in product(range(2), repeat=6):
        for label, glyph in GLYPHS.items():
            clean = [int(cell) for cell in glyph.replace(" ", "")]
            flips = sum(a != b for a, b in zip(table_of, clean))
            drawn = (0.5, 0.3, 0.2)[label] * FLIP**flips * (1 - FLIP) ** (6 - flips)
            for letters in product(range(2), repeat=2):
                says = (label == 1, sum(table_of) > 3)
                wrong = sum(a != b for a, b in zip(letters, says))
                canvases.append([*table_of, 2 + label, *(5 + letter for letter in letters)])
                chances.append(drawn * MISNAMED**wrong * (1 - MISNAMED) ** (2 - wrong))
    p = torch.tensor(chances, dtype=torch.float64)
    assert abs(float(p.sum()) - 1) < 1e-12
    return torch.tensor(canvases), p


def base():
    """The digit value of each digit of a canvas number: part ids and the mask are its digits."""
    sizes = torch.tensor([3] * 6 + [4] + [3] * 2)
    return sizes, torch.cat([sizes.flip(0).cumprod(0).flip(0)[1:], torch.ones(1).long()])


def first_ids():
    return SPACE.spans(9)[:, 0]


def number(canvas):
    """The number of each canvas (B, 9), masks being the last digit of their part."""
    sizes, value = base()
    digit = torch.where(canvas == SPACE.mask_id, sizes - 1, canvas - first_ids())
    return (digit * value).sum(1)


@cache
def table():
    """Ideal conditional log-probabilities of every canvas, (canvases, 9, 7), by enumeration."""
    clean, p = world()
    sizes, value = base()
    digits = torch.arange(int(sizes.prod()))[:, None] // value % sizes
    canvas = torch.where(digits == sizes - 1, SPACE.mask_id, digits + first_ids())
    found = torch.nn.functional.one_hot(clean, SPACE.vocab_size).double()
    rows = []
    for some in canvas.split(4096):
        fits = ((some[:, None] == clean) | (some[:, None] == SPACE.mask_id)).all(2)
        rows.append(torch.einsum("bs,slv->blv", fits * p, found))
    weight = torch.cat(rows)
    return (weight / weight.sum(2, keepdim=True)).log()


def ideal():
    return from_logits(lambda tokens: table()[number(tokens)])


def positions(given):
    """The positions that are given, (9,) bool."""
    mask = torch.zeros(9, dtype=torch.bool)
    for part, is_given in zip(PARTS.values(), given):
        mask[part] = is_given
    return mask


def test_the_ideal_denoiser_is_the_conditional_of_each_position():
    clean, p = world()
    canvas = torch.full((1, 9), SPACE.mask_id)
    canvas[0, LABEL] = 4
    seven = clean[:, 6] == 4
    expected = (p * seven * (clean[:, 1] == 1)).sum() / (p * seven).sum()
    assert float(ideal()(canvas)[0, 1, 1].exp()) == pytest.approx(float(expected))
    assert float(expected) == pytest.approx(1 - FLIP)


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("given", SUBSETS, ids=str)
def test_the_rest_given_any_parts_has_the_exact_conditional_law(given, case):
    """Chi-square, summed over the values of what is given, each in proportion to its chance."""
    clean, p = world()
    fixed = positions(given)
    kept = torch.where(fixed, clean, SPACE.mask_id)
    values, which = kept.unique(dim=0, return_inverse=True)
    chance = torch.zeros(len(values), dtype=torch.float64).index_add(0, which, p)
    each = (chance * SAMPLES).round().long().clamp(min=1)
    name, options = EXACT[case]
    *_, last = find("samplers", name)(
        ideal(), values.repeat_interleave(each, 0), space=SPACE, seed=17, **options
    )
    assert torch.equal(last.tokens[:, fixed], values.repeat_interleave(each, 0)[:, fixed])
    observed = torch.zeros(len(table()), dtype=torch.float64)
    observed.index_add_(0, number(last.tokens), torch.ones(len(last.tokens), dtype=torch.float64))
    expected = each[which] * p / chance[which]
    assert chi_square(observed[number(clean)], expected, which) > FALSE_ALARM
    assert observed[number(clean)].sum() == len(last.tokens)


def chi_square(observed, expected, group):
    """The p-value of independent groups: the statistics of each add up, and its freedom.

    Cells expected below 5 are pooled within their group, with its largest cell where that is
    still too little. Groups of fewer than 10, rare values of what is given, are left out.
    """
    statistic, freedom = 0.0, 0
    for one in range(int(group.max()) + 1):
        table_of = torch.stack([observed, expected], 1)[group == one]
        if float(table_of[:, 1].sum()) < 10:
            continue
        table_of = table_of[table_of[:, 1].argsort(descending=True)]
        large = int((table_of[:, 1] >= 5).sum())
        rest = table_of[max(1, large) :].sum(0)
        table_of = table_of[: max(1, large)].clone()
        if float(rest[1]) >= 5:
            table_of = torch.cat([table_of, rest[None]])
        else:
            table_of[0] += rest
        statistic += float(((table_of[:, 0] - table_of[:, 1]) ** 2 / table_of[:, 1]).sum())
        freedom += len(table_of) - 1
    return float(stats.chi2.sf(statistic, freedom))


def test_samples_of_another_conditional_are_rejected():
    """A mutant that ignores what is given: its draws have the marginal law."""
    clean, p = world()
    kept = torch.where(positions((False, True, False)), clean, SPACE.mask_id)
    _, which = kept.unique(dim=0, return_inverse=True)
    chance = torch.zeros(3, dtype=torch.float64).index_add(0, which, p)
    rest = number(torch.where(positions((False, True, False)), 2, clean))
    marginal = torch.zeros(len(table()), dtype=torch.float64).index_add(0, rest, p)[rest]
    assert chi_square(SAMPLES * chance[which] * marginal, SAMPLES * p, which) < FALSE_ALARM
    assert chi_square(SAMPLES * p, SAMPLES * p, which) == pytest.approx(1)


@pytest.mark.parametrize("given", SUBSETS, ids=str)
def test_the_exact_bound_is_the_conditional_of_any_parts(given):
    """Of an ideal denoiser it is -log p(rest | given), not only above it."""
    clean, p = world()
    rows = torch.arange(0, len(clean), 61)
    kept = torch.where(positions(given), clean, SPACE.mask_id)
    _, which = kept.unique(dim=0, return_inverse=True)
    chance = torch.zeros(len(clean), dtype=torch.float64).index_add(0, which, p)[which]
    bound = nll_bound(
        ideal(), clean[rows], space=SPACE, schedule=Linear(), estimator="exact", seed=0,
        may_hide=~positions(given).expand(len(rows), -1),
    )  # fmt: skip
    assert torch.allclose(bound.nats, -(p / chance).log()[rows], atol=1e-9)


def test_a_part_answers_in_its_own_ids_in_both_directions():
    """Classification and drawing by label are one call with other parts given."""
    clean, _ = world()
    one = torch.full((400, 9), SPACE.mask_id)
    one[:, GRID] = torch.tensor([0, 1] * 3)
    *_, last = find("samplers", "first_hitting")(ideal(), one, space=SPACE, seed=2)
    assert torch.isin(last.tokens[:, 6], torch.arange(2, 5)).all()
    assert float((last.tokens[:, 6] == 3).double().mean()) > 0.7
    asked = torch.full((400, 9), SPACE.mask_id)
    asked[:, LABEL] = 3
    *_, last = find("samplers", "halton")(ideal(), asked, space=SPACE, seed=2, grid=(3, 2))
    table_of = last.tokens[:, GRID].double().mean(0)
    assert torch.allclose(table_of, torch.tensor([FLIP, 1 - FLIP] * 3).double(), atol=0.1)
    assert last.tokens.shape[1] == clean.shape[1]
