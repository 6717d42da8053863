"""Samplers that take tokens back against tables of official code; see tests/golden/README.md."""

from __future__ import annotations

import json
import re

import pytest
import torch
from folders import GOLDEN
from safetensors.torch import load_file

import mdiff
from mdiff import from_logits
from mdiff.find import find
from mdiff.samplers.remdm import loop_shares
from mdiff.sampling import largest_sigma, stays_hidden
from mdiff.tokens import TokenSpace

REMDM = json.loads((GOLDEN / "remasking" / "remdm_step.json").read_text())["cases"]
PSI = load_file(GOLDEN / "remasking" / "golden.safetensors")
STEPS = load_file(GOLDEN / "schedulers_text" / "golden.safetensors")
EDITS = load_file(GOLDEN / "llada2_moe" / "golden_editing.safetensors")
LOGLINEAR = {a: (1 - 1e-3) * a for a in (0.05, 0.3, 0.5, 0.6, 0.7, 0.9)}


def hiding(name, m_t, m_s, eta):
    """Sigma of the rule that the official code calls so."""
    most = largest_sigma(m_t, m_s)
    return {
        "mdlm": 0.0, "remdm-cap": min(eta, most), "remdm-rescale": eta * most,
        "forward-backward": (m_t - m_s) / (1 - m_t), "remdm-loop": min(eta, most),
    }[name]  # fmt: skip


@pytest.mark.parametrize("case", REMDM, ids=lambda c: f"{c['sampler']}-{c['t']}-{c['eta']}")
def test_transitions_are_those_of_remdm(case):
    x, p = torch.tensor(case["x"]), torch.tensor(case["p_x0"], dtype=torch.float64)
    expected = torch.tensor(case["q_xs"], dtype=torch.float64)
    m_t, m_s = case["t"], case["t"] - case["dt"]
    name, hidden = case["sampler"], x == 8
    if name == "remdm-loop":
        if case["t"] > 0.55:
            shares = loop_shares(10_000).tolist()
            m_t, m_s = (shares[round(10_000 * (1 - t))] for t in (m_t, m_s))
            name = "mdlm"
        else:
            m_t = m_s = 0.1
    if name == "remdm-conf":
        p_written = torch.tensor([0.0 if c is None else c for c in case["conf"]])
        weight = p_written.double().masked_fill(hidden, -torch.inf).softmax(0)
        sigma = largest_sigma(m_t, m_s) * weight
    else:
        sigma = torch.full((len(x),), hiding(name, m_t, m_s, case["eta"]), dtype=torch.float64)
    stays = stays_hidden(m_t, m_s, sigma)
    made = torch.where(hidden[:, None], (1 - stays)[:, None] * p, 0)
    made[torch.arange(len(x)), x] += torch.where(hidden, stays, 1 - sigma)
    made[:, 8] = torch.where(hidden, stays, sigma)
    if case["sampler"] == "mdlm" or (case["sampler"] == "remdm-loop" and case["t"] > 0.55):
        # The plain update is not normalised there, and it is of masks alone.
        made, expected = made[hidden], expected[hidden] / expected[hidden].sum(1, keepdim=True)
    if name == "remdm-loop" and case["eta"] > largest_sigma(0.1, 0.1):
        # There the official chance is negative: -4.4. Ours stops at the largest that there is.
        assert float(expected.min()) < 0 <= float(made.min())
        return
    assert (made - expected).abs().max() < 1e-5


@pytest.mark.parametrize("key", [k for k in PSI if k.startswith("absorb.loglinear.psi")])
def test_transitions_are_those_of_psi(key):
    t, s, kappa = (float(number) for number in re.findall(r"\d+\.\d+", key))
    x, p = PSI["absorb.x"], PSI["absorb.log_p_x0"].double().exp()
    m_t, m_s = LOGLINEAR[t], LOGLINEAR[s]
    sigma = (1 - kappa) * m_s
    stays, hidden = stays_hidden(m_t, m_s, sigma), x == 8
    made = torch.where(hidden[..., None], (1 - stays) * p, 0)
    own = torch.nn.functional.one_hot(x, 9).double()
    made += own * torch.where(hidden, stays, 1 - sigma)[..., None]
    made[..., 8] = torch.where(hidden, stays, torch.as_tensor(sigma, dtype=torch.float64))
    assert (made - PSI[key].double()).abs().max() < 1e-5


def recorded(logits):
    """A denoiser that gives the logits (calls, B, L, V) of one call after the other."""
    calls = iter(logits)
    return from_logits(lambda tokens: next(calls))


def test_path_planning_decides_as_open_dllm_does():
    raw, ids = PSI["p2.raw_logits_at_step"], PSI["p2.x_at_step"]
    shifted = torch.cat([raw[:, :, :1], raw[:, :, :-1]], 2)
    states = list(find("samplers", "path_planning")(
        recorded(shifted), ids[0], space=TokenSpace(20, mask_id=19), temperature=0.0, steps=6,
        score="drawn",
    ))  # fmt: skip
    assert torch.equal(torch.stack([state.tokens for state in states]), ids[1:])


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("step", [0, 4, 7])
def test_the_budget_of_a_call_accepts_what_the_entropy_bound_does(case, step):
    bound, low, high = [(0.1, 0.4, 0.8), (1.5, 0.4, 0.8), (4.0, 1.0, 1.0)][case]
    temperature = low + (high - low) * (8 - step) / 8
    logits = STEPS["eb.logits"] / temperature
    canvas = torch.full(logits.shape[:2], 20)
    first = next(find("samplers", "budget")(
        from_logits(lambda tokens: logits), canvas, space=TokenSpace(20, mask_id=20),
        nats_per_call=bound,
    ))  # fmt: skip
    assert torch.equal(first.revealed, STEPS[f"eb.case{case}.step{step}.accepted_index"].bool())


REFINE = {
    "q": (0.7, 0.5, [2] * 8), "s": (0.35, 0.4, [1] * 12), "no_edit": (0.6, 2.0, [2] * 5),
    "quota3": (1.5, 0.6, [3, 3, 2, 2, 2, 2, 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFINE)
def test_edit_decides_as_block_refinement_does(name):
    threshold, edit_threshold, quotas = REFINE[name]
    before = STEPS[f"refine.{name}.sample"]
    given = torch.zeros(before.shape[1:], dtype=torch.bool)
    given[:, :2] = True
    for step, quota in enumerate(quotas):
        logits = STEPS[f"refine.{name}.logits"][step]
        state = next(find("samplers", "edit")(
            recorded([logits]), before[step], space=TokenSpace(21, mask_id=20), given=given,
            temperature=0.0, threshold=threshold, edit_threshold=edit_threshold, least=quota,
        ))  # fmt: skip
        assert torch.equal(state.tokens, STEPS[f"refine.{name}.prev_sample"][step])
        written = STEPS[f"refine.{name}.transfer_index"][step].bool()
        assert torch.equal(state.revealed & ~state.rewritten, written)
        edited = STEPS[f"refine.{name}.editing_transfer_index"][step].bool()
        assert torch.equal(state.rewritten, edited)


THRESHOLDS = {
    "q": (0.3, 0.3, {}), "s": (0.12, 0.25, {}), "no_edit": (0.3, 2.0, {}),
    "one_each": (1.5, 0.35, {}), "s_short_post": (0.12, 0.25, {"rounds_after": 2}),
    "q_three": (0.3, 0.3, {"least": 3}),
}  # fmt: skip
# There a draw passes the threshold by our law alone, which has no share for the mask.
BY_A_HAIR = ("gen.b8.p0.s", "gen.b8.p0.s_short_post")
TRACES = sorted({key.rsplit(".", 1)[0] for key in EDITS if key.endswith(".output")})


@pytest.mark.parametrize("length", [4, 8])
def test_edit_in_blocks_generates_as_llada2_1_does(length):
    model = mdiff.load(GOLDEN / "llada2_moe", block_length=length, mask_id=63)
    for trace in (trace for trace in TRACES if f".b{length}." in trace):
        if trace in BY_A_HAIR:
            continue
        _, _, which, case = trace.split(".")
        prompt = EDITS[f"gen.prompt{which[1:]}"]
        threshold, edit_threshold, more = THRESHOLDS[case]
        whole = -(-(prompt.shape[1] + 14) // length) * length
        canvas = torch.full((1, whole), model.space.mask_id)
        canvas[:, : prompt.shape[1]] = prompt
        states = list(find("samplers", "blocks")(
            model.denoiser, canvas, space=model.space, block_length=length,
            inner=find("samplers", "edit"), temperature=0.0, threshold=threshold,
            edit_threshold=edit_threshold, **more,
        ))  # fmt: skip
        made = states[-1].tokens[:, prompt.shape[1] : prompt.shape[1] + 14]
        assert made.tolist() == EDITS[f"{trace}.output"].tolist(), trace
        assert len(states) == len(EDITS[f"{trace}.x_at_call"]), trace
        for state, fed in zip(states, EDITS[f"{trace}.x_at_call"][1:]):
            shown = fed[fed >= 0]
            assert state.tokens[0, : len(shown)].tolist() == shown.tolist(), trace


def test_the_share_of_the_mask_is_what_sets_a_trace_apart():
    model = mdiff.load(GOLDEN / "llada2_moe", block_length=8, mask_id=63)
    fed = EDITS["gen.b8.p0.s.x_at_call"][1:2, :8]
    with torch.no_grad():
        logits = model.denoiser(fed)[0, 4].double()
    theirs = float(logits.softmax(0).max())
    logits[63] = -torch.inf
    assert theirs <= 0.12 < float(logits.softmax(0).max())
