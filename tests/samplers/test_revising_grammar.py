"""Words of balanced brackets with errors: what revises makes them valid, what only fills cannot."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from mdiff import TokenSpace, from_logits, sample
from mdiff.find import names

LENGTH, MASK, WORDS = 10, 2, 500
SPACE = TokenSpace(2, mask_id=MASK)
# One test a sampler and setting.
FALSE_ALARM = 1e-6 / 16
STRINGS = torch.arange(2**LENGTH)[:, None] // 2 ** torch.arange(LENGTH - 1, -1, -1) % 2
# How a sampler starts from a finished canvas; what is hidden at first or again is its own choice.
REVISING = {
    "remdm": {"start": 0.5, "steps": 30, "eta": 0.2},
    "psi": {"start": 0.5, "steps": 30, "kappa": 0.8},
    "gibbs": {"sweeps": 3.0}, "path_planning": {"kept": 0.5, "steps": 12}, "edit": {},
}  # fmt: skip


def valid(tokens):
    """Whether each row (N, LENGTH) is balanced: 0 opens a bracket and 1 closes one."""
    depth = (1 - 2 * tokens).cumsum(1)
    return (depth >= 0).all(1) & (depth[:, -1] == 0)


DYCK = STRINGS[valid(STRINGS)]
# A tenth of the mass on all strings, so that a word with errors has conditionals too.
WEIGHT = 0.9 * valid(STRINGS).double() / len(DYCK) + 0.1 / len(STRINGS)
ONE_HOT = torch.nn.functional.one_hot(STRINGS, 2).double()


def conditionals(tokens):
    """Log-probabilities of tokens given all others that are not masks, (B, LENGTH, 2)."""
    shown = torch.nn.functional.one_hot(tokens, 3)[..., :2].double()
    wrong = (shown.flatten(1) @ (1 - ONE_HOT).flatten(1).T).round()
    fits, one_off = ((WEIGHT * (wrong == n)) @ ONE_HOT.flatten(1) for n in (0, 1))
    # A string with one error has it at this position, where it holds the other token.
    others = one_off.view(-1, LENGTH, 2) * shown.flip(-1)
    mass = fits.view(-1, LENGTH, 2) + others
    return (mass / mass.sum(-1, keepdim=True)).log()


@pytest.fixture(scope="module")
def corrupted():
    """Uniform words with three errors each, of which none can be balanced."""
    generator = torch.Generator().manual_seed(0)
    rows = DYCK[torch.randint(len(DYCK), (WORDS,), generator=generator)]
    errors = torch.rand(WORDS, LENGTH, generator=generator).argsort(1)[:, :3]
    return rows.scatter(1, errors, 1 - rows.gather(1, errors))


def revised(name, canvas, **options):
    """The canvas after a sampler that may change every token."""
    given = torch.zeros_like(canvas, dtype=torch.bool)
    model = from_logits(conditionals)
    return sample(model, canvas, space=SPACE, sampler=name, given=given, seed=4, **options).tokens


FILLING = ("amused", "ancestral", "any_order", "blocks", "budget", "confidence", "first_hitting",
           "halton", "speculative")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in names("samplers") if name not in FILLING])
def test_revising_makes_words_with_errors_valid_far_above_chance(name, corrupted):
    after = revised(name, corrupted, **REVISING.get(name, {}))
    if torch.equal(after, corrupted):
        assert name not in REVISING
        return
    assert not valid(corrupted).any()
    right = int(valid(after).sum())
    # A word drawn uniformly from all strings is valid with this probability.
    assert stats.binom.sf(right - 1, WORDS, len(DYCK) / len(STRINGS)) < FALSE_ALARM
    # Most tokens stay: the words are mended, not replaced.
    assert float((after == corrupted).double().mean()) > 0.5


@pytest.mark.parametrize("name", [name for name in names("samplers") if name in FILLING])
def test_filling_alone_changes_nothing_in_a_finished_word(name, corrupted):
    assert torch.equal(revised(name, corrupted), corrupted)


def test_the_score_of_the_standing_token_mends_more_than_that_of_a_draw(corrupted):
    options = REVISING["path_planning"]
    standing, drawn = (
        int(valid(revised("path_planning", corrupted, score=score, **options)).sum())
        for score in ("standing", "drawn")
    )
    # The difference of two binomials, in its standard errors.
    assert (standing - drawn) / (WORDS / 2) ** 0.5 > 6


def test_gibbs_has_the_grammar_itself_as_its_law_in_the_end(corrupted):
    after = revised("gibbs", corrupted[:200], sweeps=20.0)
    expected = float(WEIGHT[valid(STRINGS)].sum())
    found = int(valid(after).sum())
    assert stats.binomtest(found, 200, expected).pvalue > FALSE_ALARM
