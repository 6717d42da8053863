"""Budget: as many tokens a call as a bound on the error in nats permits (Ben-Hamu et al. 2025)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.sampling import State, Unmasking
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def budget(
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
    nats: float | None = None,
    nats_per_call: float | None = None,
) -> Iterator[State]:
    """States on `canvas` (B, L) that reveal the positions of least entropy, within a budget.

    Each call reveals the k hidden positions of least entropy, the most whose entropies without
    the largest sum to what may be spent: the joint of k positions is nearer than that to the
    product of their conditionals (Ben-Hamu et al. 2025, entropy-bounded unmasking).
    `nats_per_call` is that number at each call; `nats` (2 by default) is the total of a sample,
    of which at most the share of its tokens that are revealed is spent at any time. At least one
    position a call costs nothing. With the conditionals of one joint, temperature 1 and no
    filters, the divergence of the joint from this law is at most the mean nats spent, which a
    `Sample` states.

    Raises ConfigError where both are given, or a number is negative or not finite.
    """
    if nats is not None and nats_per_call is not None:
        raise ConfigError(f"nats={nats} and nats_per_call={nats_per_call}: give one of them")
    total = 2.0 if nats is None else nats
    for name, value in (("nats", total), ("nats_per_call", nats_per_call or 0.0)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name}={value}: expected a finite number of nats, at least 0")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    spent = torch.zeros(canvas.shape, dtype=torch.float64, device=canvas.device)[:, 0]
    unknown = torch.full(canvas.shape, torch.inf, dtype=torch.float64, device=canvas.device)
    rank = torch.arange(1, canvas.shape[1] + 1, device=canvas.device)
    whole, left, step = fill.start[:, None].clamp(min=1), fill.start, 0
    while any(fill.left):
        hidden, t = fill.hidden, fill.time_left(schedule)
        drawn = fill.ask(hidden, step, t, number=fill.left)
        entropy = drawn.entropy.double()
        table = unknown.masked_scatter(hidden, entropy)
        ascending = table.sort(dim=1, stable=True).values.nan_to_num(posinf=0.0)
        cost = ascending.cumsum(1) - ascending
        if nats_per_call is None:
            done = (fill.start - left)[:, None] + rank
            fits = spent[:, None] + cost <= total * done / whole
        else:
            fits = cost <= nats_per_call
        # Costs only grow; what may be spent grows too, so the last that fits is the most.
        most = torch.where(fits & (rank <= left[:, None]), rank, 1).amax(1).minimum(left)
        spent = spent + cost.gather(1, (most - 1).clamp(min=0)[:, None])[:, 0]
        left = left - most
        yield fill.reveal_surest(hidden, drawn, -entropy, t, count=most, number=most.tolist())
        step += 1
