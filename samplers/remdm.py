"""ReMDM: ancestral sampling that hides written tokens again (Wang et al. 2025)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError, nearest
from mdiff.sampling import (
    LastWriting,
    State,
    Unmasking,
    even_times,
    grid_of_shares,
    largest_sigma,
    remask,
)
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace

RULES = ("cap", "rescale", "conf", "loop", "forward_backward")
# `loop`: the share that is shown while tokens are revised, and between which times that is.
LOOP_SHOWN, LOOP_FROM, LOOP_TO = 0.9, 0.55, 0.05


def remdm(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule = Linear(),  # noqa: B008
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    given: Tensor | None = None,
    steps: int = 128,
    rule: str = "cap",
    eta: float | None = None,
    start: float | None = None,
) -> Iterator[State]:
    """States of at most `steps` calls on `canvas` (B, L), in which written tokens are hidden again.

    From m_t to m_s a written token is hidden with sigma, at most smax = min(1, m_s / (1 - m_t)),
    and a hidden one is revealed just so much more often that every marginal is that of the
    masking process. `rule` says what sigma is: "cap" min(eta, smax) (eta 0.02 by default),
    "rescale" eta smax (0.04), "conf" smax times the softmax over the sample's written tokens of
    minus their probability at writing, "forward_backward" (m_t - m_s) / (1 - m_t), and "loop"
    runs without to 9 of 10 shown, stays there with min(eta, smax) (0.02) between the times 0.55
    and 0.05, and fills the rest in. eta=0 is `ancestral` draw for draw.

    A finished canvas is revised from `start` on, the time to whose share it is first hidden; the
    positions that it may change are those not in `given`.

    Raises ConfigError for an unknown rule, eta outside [0, 1] or where the rule has none, and
    steps or a start out of range.
    """
    if rule not in RULES:
        raise ConfigError(f"rule={rule!r}; {nearest(rule, RULES)}")
    if eta is not None and (rule in ("conf", "forward_backward") or not 0 <= eta <= 1):
        none = "" if rule in ("cap", "rescale", "loop") else f"; rule={rule!r} has none"
        raise ConfigError(f"eta={eta}: expected 0 to 1{none}")
    if rule == "loop" and start is not None:
        raise ConfigError(f"start={start}: rule='loop' begins at 1")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    writing = LastWriting(canvas) if rule == "conf" else None

    def sigma(m_t: float, m_s: float) -> float | Tensor:
        most = largest_sigma(m_t, m_s)
        if writing is not None:
            written = fill.free & ~fill.hidden
            p = writing.log_prob.double().exp().neg().masked_fill(~written, -torch.inf)
            return most * p.softmax(1).nan_to_num(0.0)
        if rule == "forward_backward":
            return min(most, (m_t - m_s) / (1 - m_t)) if m_t < 1 else most
        if rule == "rescale":
            return (0.04 if eta is None else eta) * most
        if rule == "loop" and m_t != m_s:
            return 0.0
        return min(0.02 if eta is None else eta, most)

    if rule == "loop":
        m = loop_shares(steps, canvas.device)
    else:
        m = grid_of_shares(schedule, steps, start, canvas.device)
    yield from remask(fill, m, schedule, sigma, start=start, writing=writing)


def loop_shares(steps: int, device: torch.device | None = None) -> Tensor:
    """The hidden shares of rule "loop", (steps + 1,) float64, from 1 to 0.

    Raises ConfigError as `even_times`.
    """
    t = even_times(steps, device)
    rising = 1 - LOOP_SHOWN * (1 - t) / (1 - LOOP_FROM)
    shown = torch.where(t > LOOP_FROM, rising, 1 - LOOP_SHOWN)
    return torch.where(t < LOOP_TO, (1 - LOOP_SHOWN) * t / LOOP_TO, shown)
