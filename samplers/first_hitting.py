"""First hitting: jump from one reveal to the next (Zheng et al. 2024, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.filling import Filling, State
from mdiff.kernels import philox
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def first_hitting(
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
    per_call: int = 1,
) -> Iterator[State]:
    """States of the exact sampler: one call for each hidden token of a sample, and not more.

    With n places of `canvas` (B, L) hidden at time t, the next reveal is at the time with
    m(next) = u^(1/n) m(t), the largest of n uniforms; the place is uniform among the hidden
    ones and the token is drawn from the denoiser at that time. Each sample has its own times.
    `per_call=k` reveals k places at the k-th such time from one call: k times fewer calls,
    and then no longer the exact law (the k tokens are drawn independently).

    Raises ConfigError for per_call < 1 and for sampling options out of range.
    """
    if per_call < 1:
        raise ConfigError(f"per_call={per_call}: need at least 1")
    fill = Filling(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    most = int(fill.start.max())
    per_call = max(1, min(per_call, most))
    steps = -(-most // per_call)
    for_time = fill.row_uniforms(philox.TIME, steps=steps, lanes=per_call)
    for_place = fill.row_uniforms(philox.ORDER, steps=steps, lanes=per_call)
    m = torch.ones(len(canvas), dtype=torch.float64, device=canvas.device)
    for step in range(steps):
        at = torch.zeros_like(fill.hidden)
        for hit in range(per_call):
            left = fill.hidden & ~at
            n = left.sum(1)
            m = torch.where(n > 0, m * for_time[:, step, hit] ** (1 / n.clamp(min=1)), m)
            place = (for_place[:, step, hit] * n).long()
            at |= left & (left.cumsum(1) - 1 == place[:, None])
        t = schedule.time_at(m)
        yield fill.reveal(at, fill.ask(at, step, t), at, t)
