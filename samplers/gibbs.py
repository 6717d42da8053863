"""Gibbs: draw one token again given all others, at random positions (Geman & Geman 1984)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.samplers.first_hitting import first_hitting
from mdiff.sampling import State, Unmasking, streams
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace

# Positions of so many steps are drawn at once.
AHEAD = 64


def gibbs(
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
    sweeps: float = 1.0,
) -> Iterator[State]:
    """States on `canvas` (B, L) that draw one token of each sample again, given all its others.

    What is hidden is first filled in by `first_hitting`. Then each call hides one position of a
    sample, uniform among those not given, and draws it from the denoiser: with the conditionals
    of one joint that joint is stationary. `sweeps` times the number of its positions, rounded,
    are the calls of a sample.

    Raises ConfigError for sweeps that are negative or not finite.
    """
    if not 0 <= sweeps < 1 << 20:
        raise ConfigError(f"sweeps={sweeps}: expected a number from 0 to {1 << 20}")
    last = None
    for last in first_hitting(
        denoiser, canvas, space=space, schedule=schedule, seed=seed, valid=valid, cond=cond,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, given=given,
    ):  # fmt: skip
        yield last
    seeds, samples = streams(seed, len(canvas), canvas.device)
    if given is None:
        given = canvas != space.mask_id
    tokens = canvas if last is None else last.tokens
    fill = Unmasking(
        denoiser, tokens, space=space.checked(), seed=philox.derive(seeds, samples, 0, 1),
        valid=valid, cond=cond, given=given, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p,
    )  # fmt: skip
    if last is not None:
        fill.calls, fill.rounds, fill.states = last.calls, last.rounds, last.step
    count = fill.free.sum(1)
    moves = (sweeps * count.double()).round().long()
    total = moves.tolist()
    t = schedule.time_at(1 / count.clamp(min=1).double())
    order = (fill.free.cumsum(1) - 1).masked_fill(~fill.free, -1)
    for step in range(max(total)):
        if step % AHEAD == 0:
            steps = torch.arange(step, min(step + AHEAD, max(total)), device=canvas.device)
            u = philox.uniform(
                fill.seed[:, None], 0, fill.sample[:, None], steps, purpose=philox.ORDER
            )
        chosen = (u[:, step % AHEAD] * count).long()
        at = (order == chosen[:, None]) & (moves > step)[:, None]
        number = [int(step < n) for n in total]
        drawn = fill.ask(at, step, t, number=number, leave_out=True)
        yield fill.revise(at, drawn, t, write=at, left=fill.left)
