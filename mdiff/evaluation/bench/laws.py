"""The sides of a comparison of draws, the input that all are given, and the law of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.errors import BackendError
from mdiff.evaluation.bench.baselines import (
    amused_step,
    diffusers_amused_step,
    llada_step,
    mdlm_step,
)
from mdiff.evaluation.selftest import chi_square_p
from mdiff.ops import backend_name, draw

MDLM, MDLM_FLOAT32 = "MDLM float64", "MDLM float32"
LLADA, AMUSED, DIFFUSERS = "LLaDA float64", "AmusedScheduler.step", "diffusers AmusedScheduler"
OURS = ("c", "torch")

LAW_IDS, LAW_DRAWS = 40, 20_000
FALSE_ALARM = 1e-6
# The standard deviation of the logits, as of an uncertain model.
SPREAD = 3.0


@dataclass(frozen=True)
class Case:
    """Logits that both sides get, and a canvas.

    `logits` (N, V), the last column -inf: that of the mask, which MDLM and LLaDA have inside the
    vocabulary, so that all sides draw from the same law. `tokens` (N,) holds the mask where
    hidden; `requested` (M, V) are the hidden rows, as a denoiser returns them for `at`. The step
    goes from time t to s where the baseline has times.
    """

    logits: Tensor
    tokens: Tensor
    requested: Tensor
    t: float = 0.5
    s: float = 0.499

    @property
    def mask_id(self) -> int:
        """The last column."""
        return self.logits.shape[1] - 1

    @property
    def hidden(self) -> Tensor:
        """The rows (N,) bool at which a token is drawn."""
        return self.tokens == self.mask_id


@dataclass(frozen=True)
class Law:
    """Whether a side draws from softmax and leaves given tokens alone."""

    name: str
    p_value: float
    given_kept: bool

    @property
    def passed(self) -> bool:
        """No chi-square beyond the false alarm of 1e-6, no given token changed."""
        return self.p_value > FALSE_ALARM and self.given_kept


Side = Callable[[Case], Tensor]


def sides(device: str = "cpu", ours: tuple[str, ...] = OURS) -> tuple[dict[str, Side], list[str]]:
    """Every side that can run here, by name, ours first, and why each of the others cannot.

    A side returns the tokens (N,) of a case after its draw.
    """

    def of_backend(name: str) -> Side:
        return lambda case: case.tokens.masked_scatter(
            case.hidden, draw(case.requested, seed=1, backend=name).tokens
        )

    def of_mdlm(dtype: torch.dtype) -> Side:
        # In float32 its in-place operations would change the logits that all sides share.
        return lambda case: mdlm_step(
            case.logits.to(dtype, copy=True), case.tokens, mask_id=case.mask_id, t=case.t,
            s=case.s, dtype=dtype,
        )  # fmt: skip

    found: dict[str, Side] = {}
    missing = []
    for name in ours:
        try:
            found[backend_name(name, device=device)] = of_backend(name)
        except BackendError as error:
            missing.append(str(error))
    found[MDLM], found[MDLM_FLOAT32] = of_mdlm(torch.float64), of_mdlm(torch.float32)
    found[LLADA] = lambda case: llada_step(case.logits, case.tokens, mask_id=case.mask_id)[0]
    found[AMUSED] = lambda case: amused_step(case.logits, case.tokens, mask_id=case.mask_id)[1]
    try:
        diffusers_amused_step(0)
        found[DIFFUSERS] = lambda c: diffusers_amused_step(c.mask_id)(c.logits, c.tokens)[1]
    except BackendError as error:
        missing.append(str(error))
    return found, missing


def make_case(rows: int, vocab: int, *, device: str = "cpu", dtype: torch.dtype) -> Case:
    """Normal logits of `SPREAD`, half of the rows hidden."""
    generator = torch.Generator(device).manual_seed(0)
    logits_NV = torch.randn(rows, vocab, generator=generator, device=device).mul_(SPREAD).to(dtype)
    logits_NV[:, -1] = -torch.inf
    tokens_N = torch.randint(vocab - 1, (rows,), generator=generator, device=device)
    order_N = torch.randperm(rows, generator=generator, device=device)
    tokens_N[order_N[: rows // 2]] = vocab - 1
    return Case(logits_NV, tokens_N, logits_NV[tokens_N == vocab - 1])


def law_case(device: str = "cpu") -> Case:
    """One row of `LAW_IDS` ids, `LAW_DRAWS` times hidden and as often given."""
    generator = torch.Generator().manual_seed(1)
    row_V = torch.randn(LAW_IDS + 1, generator=generator).mul(SPREAD / 2)
    row_V[-1] = -torch.inf
    tokens_N = torch.randint(LAW_IDS, (2 * LAW_DRAWS,), generator=generator)
    tokens_N[::2] = LAW_IDS
    logits_NV = row_V.expand(2 * LAW_DRAWS, -1).contiguous().to(device)
    # A long step, so that the joint categorical has both of its outcomes.
    return Case(logits_NV, tokens_N.to(device), logits_NV[::2].contiguous(), t=1.0, s=0.4)


def law(name: str, side: Side, case: Case) -> Law:
    """The chi-square of a side's draws; those of MDLM have the mask with probability s / t."""
    torch.manual_seed(2)
    drawn_N = side(case)
    stays = case.s / case.t if name in (MDLM, MDLM_FLOAT32) else 0.0
    p_V = case.logits[0].double().softmax(0) * (1 - stays)
    p_V[case.mask_id] = stays
    hidden_N = case.hidden
    observed_V = torch.bincount(drawn_N[hidden_N], minlength=len(p_V)).double()
    possible, p_value = p_V > 0, 0.0
    if not bool((observed_V[~possible] > 0).any()):
        expected_V = p_V * hidden_N.sum()
        p_value = chi_square_p(observed_V[possible].cpu(), expected_V[possible].cpu())
    return Law(name, p_value, torch.equal(drawn_N[~hidden_N], case.tokens[~hidden_N]))


def laws(found: Mapping[str, Side], device: str = "cpu") -> dict[str, Law]:
    """The law of every side, by name."""
    case = law_case(device)
    return {name: law(name, side, case) for name, side in found.items()}


def failures(checked: Mapping[str, Law], *names: str) -> str:
    """Which of the sides failed their check, as a note; empty where none did."""
    failing = [name for name in names if not checked[name].passed]
    return f"the law of {' and '.join(failing)} fails its check" if failing else ""
