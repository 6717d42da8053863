"""Against outputs of the official code, kept in tests/golden (its README names the sources)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from folders import GOLDEN as GOLDEN
from safetensors.torch import load_file

from mdiff.denoiser import from_logits
from mdiff.objective.loss import masked_diffusion_loss
from mdiff.objective.nll import token_nll
from mdiff.sampling import reveal_counts
from mdiff.schedule import Cosine, Exponential, Geometric, Linear, Polynomial
from mdiff.tokens import TokenSpace

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
    """Times so small and positions so chosen that only MDLM's own hidden positions are hidden."""
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


class Curve:
    """A peer's curve in terms of ours, m of t, and its slope."""

    def __init__(self, schedule, *, backwards=False, power=1):
        self.schedule, self.backwards, self.power = schedule, backwards, power

    def mask_prob(self, t):
        if self.backwards:
            return 1 - self.schedule.mask_prob(1 - t)
        return self.schedule.mask_prob(t) ** self.power

    def slope(self, t):
        if self.backwards:
            return self.schedule.weight(1 - t) * self.schedule.mask_prob(1 - t)
        return self.power * self.schedule.weight(t) * self.mask_prob(t)


# A peer's cosine is 1 - cos(pi t / 2): ours read backwards.
CURVES = {
    "loglinear": Curve(Linear()),
    "cosine": Curve(Cosine(), backwards=True),
    "cosinesqr": Curve(Cosine(), power=2),
    "linear": Curve(Exponential(20 - 1e-4)),
    "geometric": Curve(Geometric(1e-4, 20.0)),
    "square": Curve(Polynomial(2.0)),
    "square_root": Curve(Polynomial(0.5)),
}
# What each of MDLM's leaves unmasked at t = 0 and t = 1.
ENDS = dict.fromkeys(["loglinear", "cosine", "cosinesqr"], (1.0, 1e-3)) | dict.fromkeys(
    ["linear", "geometric"], (math.exp(-1e-4), math.exp(-20.0))
)


def of_peer(section, name, column):
    return torch.tensor(PURE[section]["schedules"][name][column], dtype=torch.float64)


@pytest.mark.parametrize("name", ENDS)
def test_mdlm_schedules_are_ours_after_their_affine_map(name):
    """Alpha runs from the first end to the second as 1 - m does; the weight is -alpha'/(1-alpha).

    Away from t = 0 and 1, where the cosine's own weight is taken at t = 0 when read backwards.
    """
    t = torch.tensor(PURE["mdlm_noise"]["t"], dtype=torch.float64)[:-1]
    first, last = ENDS[name]
    alpha = first + (last - first) * CURVES[name].mask_prob(t)
    # The peer's constants of the geometric curve are in float32.
    loose = 5e-6 if name == "geometric" else 1e-6
    assert torch.allclose(alpha, of_peer("mdlm_noise", name, "alpha")[:-1], rtol=loose, atol=1e-9)
    weight = (first - last) * CURVES[name].slope(t) / (1 - alpha)
    peer = of_peer("mdlm_noise", name, "elbo_weight")[:-1]
    assert torch.allclose(weight, peer, rtol=2 * loose, atol=1e-12)


@pytest.mark.parametrize("name", ["loglinear", "square", "square_root", "cosine"])
def test_bd3lm_schedules_are_ours_after_their_floors(name):
    """Its powers are floored at 0.001 in the denominator too; its cosine ends at 0.001 and adds
    it once more there. Its fourth, ln(1 + t) / ln 2, is none of ours.
    """
    t = torch.tensor(PURE["bd3lm_noise"]["t"], dtype=torch.float64)[:-1]
    m, slope = CURVES[name].mask_prob(t), CURVES[name].slope(t)
    if name == "cosine":
        m = 1e-3 + (1 - 1e-3) * m
        scaling = -(1 - 1e-3) * slope / (m + 1e-3)
    else:
        m = m if name == "loglinear" else m.clamp(min=1e-3)
        scaling = -slope / m
    assert torch.allclose(m, of_peer("bd3lm_noise", name, "move_chance")[:-1], rtol=1e-6)
    assert torch.allclose(scaling, of_peer("bd3lm_noise", name, "loss_scaling")[:-1], rtol=1e-6)


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
