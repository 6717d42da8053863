"""The stated number of calls of every sampler, with denoisers that never agree with themselves."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from mdiff import guided, sample
from mdiff.errors import MdiffWarning
from mdiff.find import names
from mdiff.sampling import bind
from mdiff.tokens import TokenSpace

VOCAB, LENGTH = 11, 12
SPACE = TokenSpace(VOCAB, mask_id=VOCAB)
NULL = {"label": torch.tensor(0)}

# The options of each sampler, and the most rounds with n hidden of f free positions.
BOUNDS = {
    "amused": ({"steps": 7}, lambda n, f: min(n, 7)),
    "ancestral": ({"steps": 5}, lambda n, f: min(n, 5)),
    "any_order": ({"order": "random"}, lambda n, f: n),
    "budget": ({"nats": 0.5}, lambda n, f: n),
    "confidence": ({"threshold": 0.9}, lambda n, f: n),
    "edit": ({"edit_threshold": 0.0, "rounds_after": 3}, lambda n, f: n + (3 if f else 0)),
    "first_hitting": ({}, lambda n, f: n),
    "gibbs": ({"sweeps": 1.5}, lambda n, f: n + round(1.5 * f)),
    "halton": ({}, lambda n, f: n),
    "path_planning": ({"steps": 9}, lambda n, f: 9),
    "psi": ({"steps": 9, "kappa": 0.0}, lambda n, f: 9),
    "remdm": ({"steps": 9, "rule": "rescale", "eta": 1.0}, lambda n, f: 9),
}
CASES = [
    *BOUNDS.items(),
    ("edit", ({"threshold": 2.0, "edit_threshold": 0.0, "rounds_after": 0}, lambda n, f: n)),
    ("edit", ({"temperature": 0.0, "threshold": 0.0}, lambda n, f: n + 16)),
    ("remdm", ({"steps": 9, "rule": "conf"}, lambda n, f: 9)),
    ("remdm", ({"steps": 9, "rule": "loop"}, lambda n, f: 9)),
    ("path_planning", ({"steps": 9, "score": "drawn"}, lambda n, f: 9)),
    ("budget", ({"nats_per_call": 0.0}, lambda n, f: n)),
]


class Adversary:
    """Logits of a counter, of what stands, or of nothing; `calls` counts."""

    uses_time = False

    def __init__(self, kind):
        self.kind, self.calls = kind, 0

    def __call__(self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None,
                 cache=None):  # fmt: skip
        self.calls += 1
        logits = torch.zeros(*tokens.shape, VOCAB)
        column = tokens.clamp(max=VOCAB - 1)[..., None]
        if self.kind == "counter":
            logits[..., self.calls % VOCAB] = 40.0
        if self.kind == "flips":
            logits = logits.scatter(2, (column + 1 + self.calls % 3) % VOCAB, 40.0)
        if self.kind == "excludes":
            logits = logits.scatter(2, column, -torch.inf)
        return logits if at is None else logits[at]


def canvases():
    """(name, canvas, given, valid): free positions from none to all, one, and only padding."""
    hidden = torch.full((3, LENGTH), SPACE.mask_id)
    text = torch.randint(VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    one, nothing = text.clone(), torch.zeros(3, LENGTH, dtype=torch.bool)
    one[:, 4] = SPACE.mask_id
    some = torch.arange(3)[:, None].expand(3, LENGTH) > 0
    yield "hidden", hidden, None, None
    yield "one position", one, None, None
    yield "none", text, None, None
    yield "finished and free", text, nothing, None
    yield "one row of padding", hidden, None, some
    yield "finished, one row of padding", text, nothing, some


@pytest.mark.filterwarnings("ignore::mdiff.errors.MdiffWarning")
@pytest.mark.parametrize("kind", [
    "flips", "excludes", pytest.param("counter", marks=pytest.mark.slow),
    pytest.param("uniform", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize(("name", "stated"), CASES)
def test_no_denoiser_makes_a_sampler_pass_its_number_of_calls(name, stated, kind):
    options, most = stated
    ways = itertools.product(canvases(), ((False, None), (True, 5)))
    for (what, canvas, given, valid), (guide, block) in ways:
        if guide and what not in ("hidden", "finished and free"):
            continue
        hidden = canvas == SPACE.mask_id
        free = hidden if given is None else ~given
        inside = torch.ones_like(free) if valid is None else valid
        chunks = torch.arange(0, LENGTH, block or LENGTH)
        model = Adversary(kind)
        other = guided(model, guidance_scale=2.0, without=NULL) if guide else model
        more = {} if block is None else {"block_length": block}
        made = sample(other, canvas, space=SPACE, sampler=name, given=given, valid=valid,
                      cond={"label": torch.ones(3)}, **options, **more)  # fmt: skip
        for row in range(3):
            bound = 0
            for first in chunks.tolist():
                part = slice(first, first + (block or LENGTH))
                n = int((hidden & inside)[row, part].sum())
                f = int((free & inside)[row, part].sum())
                bound += most(n, f) if f else 0
            assert int(made.rounds[row]) <= bound, (what, guide, block)
        assert (made.tokens[inside] < VOCAB).all(), what


def test_every_sampler_has_a_stated_number_of_calls():
    assert set(BOUNDS) | {"blocks"} >= set(names("samplers")) - {"speculative", "wino"}


def test_a_model_that_was_not_trained_to_correct_is_warned_of_once_a_call():
    class Corrects(Adversary):
        corrects = True

    canvas = torch.full((1, LENGTH), SPACE.mask_id)
    for model, options, expected in (
        (Adversary("uniform"), {}, 1), (Adversary("uniform"), {"block_length": 4}, 1),
        (Corrects("uniform"), {}, 0),
        (guided(Corrects("uniform"), guidance_scale=2.0, without=NULL), {}, 0),
        (guided(Adversary("uniform"), guidance_scale=2.0, without=NULL), {"block_length": 4}, 1),
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            sample(model, canvas, space=SPACE, sampler="edit", cond={"label": torch.ones(1)},
                   **options)  # fmt: skip
        said = [str(each.message) for each in given if each.category is MdiffWarning]
        assert len(said) == expected
        assert all("not trained to correct" in line and "\n" not in line for line in said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bind("remdm", {}, Adversary("uniform"))
        bind("blocks", {"inner": "gibbs"}, Adversary("uniform"))
