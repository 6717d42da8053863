"""A masking process that hides written tokens again, on a grid (Wang et al. 2025, ReMDM)."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.sampling.state import LastWriting, State
from mdiff.sampling.unmasking import Unmasking
from mdiff.schedule import Schedule

# The chance that a written token is hidden from one share of hidden tokens m_t to the next m_s,
# a number or (B, L).
Sigma = Callable[[float, float], float | Tensor]
# Uniforms of several steps are drawn at once: of so many steps, and so many numbers, at most.
AHEAD, AHEAD_NUMBERS = 16, 1 << 16
# Tables of so many steps are held for each sample.
MOST_STEPS = 1 << 20


def largest_sigma(m_t: float, m_s: float) -> float:
    """The largest chance of hiding that keeps the marginals: min(1, m_s / (1 - m_t))."""
    return 1.0 if m_s >= 1 - m_t else m_s / (1 - m_t)


def stays_hidden(m_t: float, m_s: float, sigma: float | Tensor) -> float | Tensor:
    """The chance (m_s - sigma (1 - m_t)) / m_t that a hidden token stays so, from m_t to m_s.

    Then a token is hidden at m_s with m_s, whatever sigma: m_t (this) + (1 - m_t) sigma = m_s.

    >>> stays_hidden(0.5, 0.25, 0.5)
    0.0
    """
    return (m_s - sigma * (1 - m_t)) / m_t


def check_steps(steps: int) -> None:
    """Raise ConfigError for steps outside 1 to MOST_STEPS."""
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"steps={steps}: need at least 1 and at most {MOST_STEPS}")


def even_times(steps: int, device: torch.device | None = None) -> Tensor:
    """Even times from 1 to 0, (steps + 1,) float64; ConfigError as `check_steps`."""
    check_steps(steps)
    return 1 - torch.arange(steps + 1, dtype=torch.float64, device=device) / steps


def grid_of_shares(
    schedule: Schedule, steps: int, start: float | None, device: torch.device | None = None
) -> Tensor:
    """M at even times from `start` (None: 1) to 0, (steps + 1,) float64.

    Raises ConfigError for steps outside 1 to MOST_STEPS, or a start outside (0, 1].
    """
    if start is not None and not 0 < start <= 1:
        raise ConfigError(f"start={start}: expected a time above 0 and at most 1")
    return schedule.mask_prob(even_times(steps, device) * (1.0 if start is None else start))


def remask(
    fill: Unmasking, m: Tensor, schedule: Schedule, sigma: Sigma, *, start: float | None = None,
    writing: LastWriting | None = None,
) -> Iterator[State]:  # fmt: skip
    """States of the process on the shares m (steps + 1,) of hidden tokens, the last of them 0.

    In a step from m_t to m_s each hidden token stays so with `stays_hidden`, otherwise it is drawn
    from the denoiser on the canvas at m_t; each written one is hidden with sigma. A position waits
    for its next event by one uniform, so that sigma = 0 is `ancestral` draw for draw; where nothing
    is revealed there is no call. With a `start` the written tokens are first hidden with m[0].
    `writing` is kept up to date, for a sigma that reads it.
    """
    shares, rows = m.tolist(), len(fill.tokens)

    @lru_cache(maxsize=2)
    def time(step: int) -> Tensor:
        return schedule.time_at(m[step]).expand(rows)

    if start is not None:
        hide = fill.free & ~fill.hidden & (fill.uniform(philox.CORRUPT) < m[0])
        if bool(hide.any()):
            yield fill.revise(fill.nothing, None, time(0), write=fill.nothing, hide=hide)
    # Of the law: a row is said to be the same alone as in a batch where another is taken back.
    chances = (sigma(m_t, m_s) for m_t, m_s in pairwise(shares))
    if any(isinstance(chance, Tensor) or chance > 0 for chance in chances):
        fill.log_prob_is_exact = False
    waits = _Waits(fill)
    for step in range(1, len(shares)):
        m_t, m_s = shares[step - 1], shares[step]
        chance = sigma(m_t, m_s)
        stays = 1.0 if m_t == 0 else stays_hidden(m_t, m_s, chance)
        due = fill.free & waits.over(fill.hidden, stays, chance)
        at, hide = due & fill.hidden, due & ~fill.hidden
        number, again = torch.stack([at.sum(1), hide.sum(1)]).tolist()
        if not any(number) and not any(again):
            continue
        drawn = None
        if any(number):
            drawn = fill.ask(at, step, time(step - 1), number=number)
        waits.restart(due, step)
        if any(again):
            left = [n + more - fewer for n, more, fewer in zip(fill.left, again, number)]
            state = fill.revise(at, drawn, time(step), write=at, hide=hide, left=left)
        elif drawn is not None:
            state = fill.reveal(at, drawn, time(step), number=number)
        if writing is not None:
            writing.add(state)
        yield state


class _Waits:
    """Each position's wait for its next event: over once the chance that it lasts is below u."""

    def __init__(self, fill: Unmasking) -> None:
        self.fill = fill
        self.u = fill.uniform(philox.REVEAL)
        self.lasts = torch.ones_like(self.u)
        self.first, self.ahead = 0, self.u[None, :0]

    def over(self, hidden: Tensor, stays: float | Tensor, sigma: float | Tensor) -> Tensor:
        """Whose wait (B, L) bool ends in this step."""
        self.lasts = torch.where(hidden, self.lasts * stays, self.lasts * (1 - sigma))
        return self.lasts <= self.u

    def restart(self, at: Tensor, step: int) -> None:
        """New waits at the positions `at` (B, L), by the uniforms of this step."""
        if not self.first <= step < self.first + self.ahead.shape[0]:
            fill, self.first = self.fill, step
            ahead = max(1, min(AHEAD, AHEAD_NUMBERS // self.u.numel()))
            steps = torch.arange(step, step + ahead, device=self.u.device)[:, None, None]
            self.ahead = philox.uniform(
                fill.seed[:, None], fill.rank, fill.sample[:, None], steps, purpose=philox.REVEAL
            )
        self.u = torch.where(at, self.ahead[step - self.first], self.u)
        self.lasts = torch.where(at, 1.0, self.lasts)
