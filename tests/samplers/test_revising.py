"""Samplers that take tokens back: what they never do, where they end, what they refuse."""

from __future__ import annotations

import pytest
import torch
from revising_toys import IDEAL, LENGTH, MASK, run
from toys import HashDenoiser

from mdiff import sample
from mdiff.errors import ConfigError, DataError
from mdiff.find import find
from mdiff.sampling import LastWriting
from mdiff.tokens import TokenSpace

REVISING = ["edit", "gibbs", "path_planning", "psi", "remdm", "wino"]


class Adversary:
    """Another law at every call: what was sure is not, and something else is."""

    uses_time = False

    def __init__(self):
        self.calls = 0

    def __call__(self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None,
                 cache=None):  # fmt: skip
        self.calls += 1
        logits = torch.full((*tokens.shape, 11), -20.0)
        logits[..., self.calls % 11] = 20.0
        return logits if at is None else logits[at]


@pytest.mark.parametrize(("name", "options", "most"), [
    ("remdm", {"steps": 40, "rule": "rescale", "eta": 1.0}, 40),
    ("remdm", {"steps": 40, "rule": "conf"}, 40),
    ("psi", {"steps": 40, "kappa": 0.0}, 40),
    ("path_planning", {"steps": 17}, 17),
    ("edit", {"threshold": 0.0, "edit_threshold": 0.0}, 12 + 16),
    ("edit", {"threshold": 2.0, "edit_threshold": 0.5, "rounds_after": 3}, 12 + 3),
    ("gibbs", {"sweeps": 2.0}, 12 + 24),
    ("wino", {}, 12),
    ("wino", {"threshold": 0.0, "keep_threshold": 1.0, "floor": 2, "most": 3, "share": 0.4}, 12),
])  # fmt: skip
def test_it_ends_within_its_calls_whatever_the_denoiser(name, options, most):
    space = TokenSpace(11, mask_id=11)
    made = sample(Adversary(), torch.full((3, 12), 11), space=space, sampler=name, **options)
    assert int(made.rounds.max()) <= most
    assert (made.tokens < 11).all()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("name", REVISING)
def test_a_finished_text_is_revised_where_it_is_not_given(name, blocks):
    space = TokenSpace(11, mask_id=5, never=(0, 9))
    canvas = torch.randint(6, 9, (6, 12), generator=torch.Generator().manual_seed(1))
    given = torch.rand(6, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    options = {"start": 0.5} if name in ("remdm", "psi") else {}
    options |= {"kept": 0.3} if name == "path_planning" else {}
    options |= {"edit_threshold": 0.1} if name == "edit" else {}
    options |= {"block_length": 4} if blocks else {}
    tally, changed = LastWriting(canvas), torch.zeros_like(given)
    bound = find("samplers", "blocks" if blocks else name)
    if blocks:
        options["inner"] = find("samplers", name)
    before = canvas
    for state in bound(HashDenoiser(space), canvas, space=space, seed=1, given=given, **options):
        for moved in (state.revealed, state.rewritten, state.hidden_again):
            assert not (moved & given).any()
        assert (state.tokens[given] == canvas[given]).all()
        assert (state.rewritten <= state.revealed).all()
        assert not (state.revealed & state.hidden_again).any()
        assert ((before != 5) & (state.tokens == 5) == state.hidden_again).all()
        assert ((before != 5) & (state.tokens != 5) & (state.tokens != before)
                == state.rewritten).all()  # fmt: skip
        tally.add(state)
        changed |= state.tokens != canvas
        before = state.tokens
    assert changed.any()
    assert ((tally.times > 0) == (tally.step > 0)).all()
    assert (tally.times[given] == 0).all()
    assert not torch.isin(before[~given], torch.tensor([0, 5, 9])).any()


@pytest.mark.parametrize("name", REVISING)
def test_without_a_free_position_there_is_no_state(name):
    canvas = torch.ones(2, 4, dtype=torch.int64)
    given = torch.ones_like(canvas, dtype=torch.bool)
    space = TokenSpace(11, mask_id=5)
    states = find("samplers", name)(HashDenoiser(space), canvas, space=space, given=given)
    assert list(states) == []


def test_a_given_mask_and_a_given_of_another_shape_are_refused():
    space = TokenSpace(11, mask_id=5)
    canvas = torch.full((2, 4), 5)
    for given, match in (
        (torch.ones(2, 4, dtype=torch.bool), "row 0, position 0 holds the mask but is given"),
        (torch.ones(2, 3, dtype=torch.bool), r"given \(2, 3\)"),
        (torch.ones(2, 4), "bool"),
        ([[True]], "expected"),
    ):
        with pytest.raises(DataError, match=match):
            sample(HashDenoiser(space), canvas, space=space, given=given)


def test_given_none_is_all_that_is_not_hidden_for_every_sampler():
    space = TokenSpace(11, mask_id=5)
    canvas = torch.full((3, 8), 5)
    canvas[:, 2:4] = 7
    for name in ("first_hitting", "confidence", "halton", "blocks", "amused", "remdm", "gibbs"):
        plain = sample(HashDenoiser(space), canvas, space=space, sampler=name, seed=4)
        named = sample(HashDenoiser(space), canvas, space=space, sampler=name, seed=4,
                       given=canvas != 5)  # fmt: skip
        assert torch.equal(plain.tokens, named.tokens)
        assert torch.equal(plain.calls, named.calls)


def test_the_log_probability_is_said_to_be_exact_only_where_it_is():
    canvas = torch.full((5, LENGTH), MASK)
    for name, options, exact in (
        ("first_hitting", {}, True), ("any_order", {}, True), ("ancestral", {"steps": 4}, True),
        ("blocks", {"block_length": 2}, True), ("first_hitting", {"top_p": 1.0}, True),
        ("first_hitting", {"temperature": 0.5}, False), ("first_hitting", {"top_k": 2}, False),
        ("first_hitting", {"min_p": 0.1}, False), ("confidence", {}, False),
        ("remdm", {"rule": "rescale", "eta": 0.9}, False), ("gibbs", {}, False),
    ):  # fmt: skip
        made = run(name, canvas, **options)
        assert made.log_prob_is_exact is exact, name
    # Also where no token of this batch happened to be taken back.
    space = TokenSpace(11, mask_id=11)
    for rule in ("cap", "conf", "loop", "rescale"):
        for seed in range(4):
            made = sample(HashDenoiser(space), torch.full((1, 2), 11), space=space,
                          sampler="remdm", rule=rule, steps=6, seed=seed)  # fmt: skip
            assert not made.log_prob_is_exact, rule
    assert run("remdm", canvas, eta=0.0, steps=6).log_prob_is_exact
    assert run("psi", canvas, kappa=1.0, steps=6).log_prob_is_exact
    assert not run("psi", canvas[:1], kappa=0.999, steps=6).log_prob_is_exact
    order = run("any_order", canvas, table=IDEAL.table)
    joint = IDEAL.joint[tuple(order.tokens.T)].log()
    assert (order.log_prob - joint).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "options"), [
    ("remdm", {"rule": "cpa"}), ("remdm", {"eta": 1.5}), ("remdm", {"eta": -0.1}),
    ("remdm", {"rule": "conf", "eta": 0.1}), ("remdm", {"steps": 0}), ("remdm", {"start": 0.0}),
    ("remdm", {"rule": "loop", "start": 0.5}), ("psi", {"kappa": 1.01}), ("psi", {"kappa": -1.0}),
    ("psi", {"start": 1.5}), ("path_planning", {"score": "standign"}),
    ("path_planning", {"kept": 1.0}), ("path_planning", {"steps": 0}),
    ("edit", {"threshold": -0.1}), ("edit", {"edit_threshold": float("nan")}),
    ("edit", {"least": 0}), ("edit", {"rounds_after": -1}), ("gibbs", {"sweeps": -1.0}),
    ("gibbs", {"sweeps": float("inf")}), ("budget", {"nats": -1.0}),
    ("wino", {"threshold": 1.1}), ("wino", {"threshold": -0.1}), ("wino", {"most": 0}),
    ("wino", {"keep_threshold": float("nan")}), ("wino", {"threshold": 0.6, "keep_threshold": 0.5}),
    ("wino", {"floor": 5, "most": 4}), ("wino", {"share": 1.5}), ("wino", {"floor": 0}),
    ("budget", {"nats": 1.0, "nats_per_call": 1.0}), ("budget", {"nats_per_call": float("nan")}),
])  # fmt: skip
def test_options_out_of_range_are_refused_before_any_call(name, options):
    space = TokenSpace(11, mask_id=5)
    model = HashDenoiser(space)
    with pytest.raises(ConfigError):
        sample(model, torch.full((2, 4), 5), space=space, sampler=name, **options)
    assert model.calls == 0
