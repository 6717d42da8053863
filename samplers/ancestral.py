"""Ancestral sampling on a grid of times (Sahoo et al. 2024, eq. 6; Shi et al. 2024, eq. 7)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.process import Process, noise_in_force
from mdiff.sampling import MOST_STEPS, State, Unmasking, denoise, even_times, grid_of_shares
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def ancestral(
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
    steps: int = 64,
    idle_calls: bool = False,
    process: Process | None = None,
) -> Iterator[State]:
    """States of `steps` even steps of time from 1 to 0 on `canvas` (B, L).

    From t to s a hidden position is revealed with probability (m(t) - m(s)) / m(t), and only
    then is its token drawn, from the denoiser at time t. These events come from one uniform u a
    position, which is hidden while m(t) > u. So where nothing is revealed there is no call, also
    for models that use the time, and a sample's calls are at most min(steps, hidden).
    `idle_calls=True` calls the model at every step all the same, for comparison. Exact as
    steps grow; at few steps, tokens of one step are drawn independently.

    A `process` whose noise also writes random tokens has its own schedule: each of the `steps`
    then asks at every position that is not given (`sampling.denoise`).

    Raises ConfigError for steps outside 1 to MOST_STEPS and for sampling options out of range.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(
            f"steps={steps}: need at least 1 and at most {MOST_STEPS}; first_hitting, which takes "
            "none, is the limit of many"
        )
    schedule, process = noise_in_force(schedule, process)
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    if process is not None:
        m = grid_of_shares(schedule, steps, None, canvas.device)
        yield from denoise(fill, process, m, space)
        return
    times = even_times(steps, canvas.device)
    ascending = schedule.mask_prob(times).flip(0)
    later = torch.searchsorted(ascending, fill.uniform(philox.REVEAL), right=True)
    due = steps + 1 - later.clamp(min=1)
    rows = len(canvas)
    # What each step reveals is known before the first call, and asked of the device once.
    numbers = torch.zeros(rows, steps + 1, dtype=torch.int64, device=canvas.device)
    table = numbers.scatter_add(1, due, fill.hidden.long()).T.tolist()
    for step in range(1, steps + 1):
        number = table[step]
        if not any(fill.left):
            return
        if any(number) or idle_calls:
            at = fill.hidden & (due == step)
            drawn = fill.ask(at, step, times[step - 1].expand(rows), number=number, idle=idle_calls)
            yield fill.reveal(at, drawn, times[step].expand(rows), number=number)
