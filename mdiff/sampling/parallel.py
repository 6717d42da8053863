"""How many of a call's draws are written: by a bound on their error, or once they settle.

With c_1 >= c_2 >= ... the probabilities of a sample's draws, and always the number asked for:

factor   the largest n with (n + 1) (1 - c_n) < factor (Fast-dLLM, Wu et al. 2025). With the
         conditionals of one joint, temperature 0 and factor=1, a call writes what greedy calls of
         one position each would (theorem 1).
frechet  the most whose 1 - c_i sum to at most that, a bound on the chance that any is wrong.
kl       those of at least the threshold whose law moved by less than `kl` nats, KL(now || before),
         in each of the last two calls (KLASS, Kim et al. 2025: threshold=0.9, kl=0.01).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.ops import Draw
from mdiff.sampling.unmasking import Unmasking

# A law has settled when it hardly moved over so many calls (Kim et al. 2025).
SETTLED_CALLS = 2
# Divergences are sums of whole numbers of 2^-40 nats: in any order, on any device, the same bits.
PARTS, MOST_NATS = 2.0**40, 1024
# Above every score.
FIRST = 2.0


def factor_fits(error: Tensor, factor: float) -> Tensor:
    """Whether (n + 1) e_n < factor for n = 1, 2, ..., (B, L) bool (Wu et al. 2025, theorem 1).

    `error` (B, L) are chances of error in ascending order.
    """
    return torch.arange(2, error.shape[1] + 2, device=error.device) * error < factor


def frechet_fits(error: Tensor, most: float) -> Tensor:
    """Whether the first n chances of error (B, L) sum to at most `most`, (B, L) bool."""
    return error.cumsum(1) <= most


class Bounded:
    """Of the surest draws as many as have 1 - probability within a bound, whatever n comes last."""

    def __init__(
        self, fill: Unmasking, fits: Callable[[Tensor, float], Tensor], bound: float
    ) -> None:
        self.ask, self.fits, self.bound = fill.ask, fits, bound

    def count(self, at: Tensor, drawn: Draw, score: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """The score (N,), and how many draws at `at` (B, L) to write, (B,), of `least` or more."""
        error = torch.full(at.shape, torch.inf, dtype=torch.float64, device=at.device)
        error = error.masked_scatter(at, 1 - drawn.log_prob.double().exp().clamp(max=1))
        fit = self.fits(error.sort(dim=1).values, self.bound).sum(1)
        return score, fit.maximum(least).minimum(at.sum(1))


class Settled:
    """The draws of at least a score whose law moved by less than `kl` nats, in each of two calls.

    That is KL(now || before) of the model's law at temperature 1, whatever the score is of. Keeps
    the last law (V,) of each position that is hidden at first, and nothing that samples share.
    """

    def __init__(self, fill: Unmasking, kl: float, least: float) -> None:
        self.fill, self.kl, self.least = fill, kl, least
        self.slot = fill.hidden.flatten().cumsum(0) - 1
        self.laws: Tensor | None = None
        self.calls = torch.zeros(sum(fill.left), dtype=torch.int64, device=fill.tokens.device)

    def ask(self, at: Tensor, step: int, t: Tensor, *, number: Sequence[int]) -> Draw:
        """`Unmasking.ask`, which takes note of the laws."""
        drawn, self.settled = self.fill.ask_beside(at, step, t, number=number, read=self._read)
        return drawn

    def count(self, at: Tensor, drawn: Draw, score: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """The score (N,) with settled draws in front, and how many to write, as `Bounded.count`."""
        ready = (score >= self.least) & (self.settled >= SETTLED_CALLS)
        settled = torch.zeros_like(at).masked_scatter(at, ready).sum(1)
        return torch.where(ready, FIRST, score), settled.maximum(least).minimum(at.sum(1))

    def _read(self, law: Tensor, part: slice) -> Tensor:
        """Over how many calls in a row the laws (n, V) of these positions hardly moved, (n,)."""
        if self.laws is None:
            # Far from any law.
            self.laws = law.new_full((len(self.calls), law.shape[1]), -torch.inf)
        slot = self.slot[self.fill.positions[part]]
        small = divergence(law, self.laws[slot]) < self.kl
        self.laws[slot] = law
        self.calls[slot] = torch.where(small, self.calls[slot] + 1, 0)
        return self.calls[slot]


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(now || before) of log-probabilities (N, V), (N,) float64, of ratios up to MOST_NATS.

    >>> divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    tensor([0.1438], dtype=torch.float64)
    """
    p = now.exp()
    terms = torch.where(p > 0, p * (now - before).clamp(max=MOST_NATS), 0)
    return (terms.double() * PARTS).round().long().sum(1).double() / PARTS


def parallel_rule(
    fill: Unmasking, *, factor: float | None, frechet: float | None, kl: float | None,
    threshold: float | None, least: float | None, score: str, noisy: bool,
) -> tuple[Bounded | Settled | None, float | None]:  # fmt: skip
    """The rule that is asked for, if any, and `least`, the threshold as a score, where it is none.

    Raises ConfigError for a bound out of range, beside noise or another one, factor or frechet by
    another score than "confidence", or kl without a threshold.
    """
    bounds = {"threshold": threshold, "factor": factor, "frechet": frechet, "kl": kl}
    asked = [f"{name}={value}" for name, value in bounds.items() if value is not None]
    if asked and noisy:
        raise ConfigError(f"{asked[0]} and noise: a bound is on the score itself, give one")
    if len(asked) > 1 and (kl is None or threshold is None or len(asked) > 2):
        raise ConfigError(f"{' and '.join(asked)}: give one of them, or threshold with kl")
    if score != "confidence" and (factor is not None or frechet is not None):
        raise ConfigError(f"{asked[0]}: a bound on probabilities, so not with score={score!r}")
    if factor is not None:
        if not 0 < factor < math.inf:
            raise ConfigError(f"factor={factor}: expected a finite number above 0")
        return Bounded(fill, factor_fits, factor), None
    if frechet is not None:
        if not 0 <= frechet <= 1:
            raise ConfigError(f"frechet={frechet}: expected a chance of error, 0 to 1")
        return Bounded(fill, frechet_fits, frechet), None
    if kl is None:
        return None, least
    if not 0 < kl < MOST_NATS:
        raise ConfigError(f"kl={kl}: expected nats, more than 0 and less than {MOST_NATS}")
    if least is None:
        raise ConfigError(f"kl={kl}: give the threshold of a settled draw too (threshold=0.9)")
    return Settled(fill, kl, least), None
