"""Against outputs of the official code, kept in tests/golden (its README names the sources)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdiff.denoiser import from_logits
from mdiff.filling import reveal_counts
from mdiff.objective import masked_diffusion_loss, token_nll
from mdiff.schedule import Cosine, Linear, Polynomial
from mdiff.tokens import TokenSpace

GOLDEN = Path(__file__).parent / "golden"
PURE = json.loads((GOLDEN / "pure_functions.json").read_text())
MDLM = TokenSpace(50, mask_id=49)


def test_mdlm_nelbo_per_token_and_mean():
    golden = load_file(GOLDEN / "mdlm" / "golden.safetensors")
    nll = token_nll(golden["logits"], golden["x0"], golden["xt"], space=MDLM)
    weight = Linear().weight(golden["t"].double())
    assert torch.allclose(weight.float(), golden["weight"], rtol=1e-5)
    nelbo = nll * weight[:, None]
    assert torch.allclose(nelbo.float(), golden["nelbo_per_token"], rtol=1e-4, atol=1e-5)
    assert float(nelbo.mean()) == pytest.approx(float(golden["nelbo_mean"]), rel=1e-4)


def test_the_loss_function_itself_gives_mdlms_value_on_the_same_corruption():
    """Times so small and places so chosen that only MDLM's own hidden places are hidden."""
    golden = load_file(GOLDEN / "mdlm" / "golden.safetensors")
    hidden = golden["xt"] == MDLM.mask_id
    t = torch.ones(4)
    loss = masked_diffusion_loss(
        from_logits(lambda _: golden["logits"]), golden["x0"], space=MDLM, schedule=Linear(),
        t=t, may_hide=hidden, weight=lambda _: 1 / golden["t"].double(), seed=0,
        total=golden["x0"].numel(),
    )  # fmt: skip
    assert torch.equal(loss.hidden, hidden)
    assert float(loss.value) == pytest.approx(float(golden["nelbo_mean"]), rel=1e-4)


@pytest.mark.parametrize(("name", "schedule"), [
    ("loglinear", Linear()), ("cosine", Cosine()),
])  # fmt: skip
def test_mdlm_schedules_are_ours_after_their_epsilon_map(name, schedule):
    """MDLM's alpha is eps + (1 - eps)(1 - m); its weight divides by 1 - alpha."""
    golden = PURE["mdlm_noise"]["schedules"][name]
    t = torch.tensor(PURE["mdlm_noise"]["t"], dtype=torch.float64)
    alpha = 1e-3 + (1 - 1e-3) * (1 - ours(name, schedule, t))
    assert torch.allclose(alpha, torch.tensor(golden["alpha"], dtype=torch.float64), rtol=1e-6)
    if name == "loglinear":
        peer = torch.tensor(golden["elbo_weight"], dtype=torch.float64)
        assert torch.allclose(schedule.weight(t), peer, rtol=1e-6)


def ours(name, schedule, t):
    """MDLM's cosine is 1 - cos(pi t / 2), which is our cosine read backwards."""
    return 1 - schedule.mask_prob(1 - t) if name == "cosine" else schedule.mask_prob(t)


@pytest.mark.parametrize(("name", "schedule"), [
    ("linear", Linear()), ("cosine", None), ("poly2", Polynomial(2.0)), ("poly3", Polynomial(3.0)),
])  # fmt: skip
def test_md4_schedules_are_ours_after_their_epsilon_map(name, schedule):
    """MD4's alpha is (1 - 2 eps) a + eps; its cosine a = 1 - cos(pi (1 - t) / 2) is ours."""
    golden = PURE["md4_schedule"]["schedules"][name]
    t = torch.tensor(PURE["md4_schedule"]["t"], dtype=torch.float64)
    schedule = schedule or _Md4Cosine()
    m = schedule.mask_prob(t)
    eps = 1e-4
    alpha = ((1 - 2 * eps) * (1 - m) + eps).float()
    assert torch.allclose(alpha, torch.tensor(golden["alpha"]), rtol=1e-6, atol=1e-7)
    slope = (1 - 2 * eps) * schedule.weight(t) * m
    weight = slope / (1 - (1 - 2 * eps) * (1 - m) - eps)
    peer = -torch.tensor(golden["weight"], dtype=torch.float64)
    # The peer takes 1 - alpha in float32: a relative error of one rounding of alpha over it.
    rounding = 2.0**-24 / (1 - alpha.double())
    assert ((weight - peer).abs() <= weight * (1e-5 + rounding)).all()


class _Md4Cosine:
    """m = cos(pi (1 - t) / 2), which is sin(pi t / 2): MaskGIT's and our cosine."""

    mask_prob = staticmethod(Cosine().mask_prob)
    weight = staticmethod(Cosine().weight)


def test_llada_transfer_counts_are_ours():
    for case in PURE["llada_num_transfer_tokens"]["cases"]:
        table = reveal_counts(
            "even", torch.tensor([case["n"]]), steps=case["steps"], schedule=Linear()
        )
        assert table[0].tolist() == case["counts"]


@pytest.mark.parametrize("method", ["uniform", "cosine", "pow2", "pow2.5"])
def test_maskgit_masks_left_are_ours_at_its_own_curve(method):
    cases = [c for c in PURE["maskgit_masks_left"]["cases"] if c["method"] == method]
    assert cases
    for case in cases:
        hidden = torch.tensor([case["tokens"] - case["known"]])
        table = reveal_counts("schedule", hidden, steps=case["steps"], schedule=Maskgit(method))[0]
        left = (int(hidden) - table.cumsum(0) + table).tolist()
        assert left == case["masked_before_each_step"]


class Maskgit:
    """MaskGIT's curves as it computes them, in float32: "powN" keeps 1 - r^N hidden.

    In float32 its cosine falls just below 1/2 at two thirds, where ours is 1/2.
    """

    def __init__(self, method):
        self.method = method

    def mask_prob(self, t):
        ratio = torch.tensor(1 - t, dtype=torch.float32)
        if self.method == "cosine":
            return torch.cos(math.pi / 2 * ratio)
        return 1 - ratio ** (1.0 if self.method == "uniform" else float(self.method[3:]))
