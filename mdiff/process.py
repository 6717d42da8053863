"""Noise processes: how clean tokens are hidden or written over, and the transitions between.

At a level of noise m a token is kept with `keep`, hidden with `mask`, and written over by one of
the n ids that its position may hold, each with `other` / n: q(. | x) = keep x + mask M + other U.
The level is m(t) of a schedule, from 0 (clean) to 1. All is in float64.

A prediction of the clean token is `leave_one_out`, P(x_i | z without z_i), or `posterior`,
P(x_i | z); for masks both agree. The transitions and the bound here are of the first; `posterior`
ones are converted (`leave_one_out`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mdiff.errors import ConfigError
from mdiff.schedule import Linear, Schedule, built
from mdiff.tokens import TokenSpace

# A random id that is less likely is none: 1 / q stays inside float32.
LEAST_OTHER = 1e-30


class Noise(NamedTuple):
    """The shares of kept, hidden and overwritten tokens, which sum to 1, or their slopes in m."""

    keep: Tensor
    mask: Tensor
    other: Tensor


@runtime_checkable
class Process(Protocol):
    """A noise process: a schedule m(t), and what becomes of a token at m."""

    @property
    def schedule(self) -> Schedule: ...

    def noise(self, m: Tensor) -> Noise:
        """The shares at m in [0, 1], any shape; keep is 1 at 0 and 0 at 1."""

    def slope(self, m: Tensor) -> Noise:
        """Their derivatives in m, inside (0, 1)."""


@dataclass(frozen=True)
class Masking:
    """Tokens are hidden only (Sahoo et al. 2024; Shi et al. 2024)."""

    schedule: Schedule = field(default_factory=Linear)

    def noise(self, m: Tensor) -> Noise:
        """1 - m, m, 0."""
        return Noise(1 - m, m, torch.zeros_like(m))

    def slope(self, m: Tensor) -> Noise:
        """-1, 1, 0."""
        one = torch.ones_like(m)
        return Noise(-one, one, torch.zeros_like(m))


@dataclass(frozen=True)
class Uniform:
    """Tokens are written over only (UDLM, Schiff et al. 2025; Duo, Sahoo et al. 2025)."""

    schedule: Schedule = field(default_factory=Linear)

    def noise(self, m: Tensor) -> Noise:
        """1 - m, 0, m."""
        return Noise(1 - m, torch.zeros_like(m), m)

    def slope(self, m: Tensor) -> Noise:
        """-1, 0, 1."""
        one = torch.ones_like(m)
        return Noise(-one, torch.zeros_like(m), one)


@dataclass(frozen=True)
class Mixed:
    """Masks, and random tokens that are most frequent in the middle (GIDD, von Rütte et al. 2025).

    keep, mask, other = (1 - m, m, c) / (1 + c) with c = B (m (1 - m))^(gamma / 2) and
    B = 2^gamma p / (1 - p), so that the share of random tokens is `p_uniform` = p at m = 1/2.
    """

    schedule: Schedule = field(default_factory=Linear)
    p_uniform: float = 0.1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.p_uniform < 1:
            raise ConfigError(f"p_uniform={self.p_uniform}: expected at least 0 and less than 1")
        # Beyond 2 random tokens would have to become clean again as m grows to 1.
        if not 0 < self.gamma <= 2:
            raise ConfigError(f"gamma={self.gamma}: expected above 0 and at most 2")

    def noise(self, m: Tensor) -> Noise:
        """(1 - m, m, c) / (1 + c)."""
        c = self._random(m)
        return Noise((1 - m) / (1 + c), m / (1 + c), c / (1 + c))

    def slope(self, m: Tensor) -> Noise:
        """The derivatives, with c' = c gamma (1 - 2 m) / (2 m (1 - m))."""
        c = self._random(m)
        rise = c * self.gamma / 2 * (1 - 2 * m) / (m * (1 - m))
        whole = (1 + c) ** 2
        return Noise((-(1 + c) - (1 - m) * rise) / whole, (1 + c - m * rise) / whole, rise / whole)

    @property
    def size(self) -> float:
        """B."""
        return 2**self.gamma * self.p_uniform / (1 - self.p_uniform)

    def _random(self, m: Tensor) -> Tensor:
        return self.size * (m * (1 - m)) ** (self.gamma / 2)


@dataclass(frozen=True)
class Logistic:
    """Masks at much noise, random tokens at little (scaled GIDD, von Rütte et al. 2025b).

    Of the noise m the share sigmoid(scale l + shift) are random tokens, l = log((1 - m) / m).
    """

    schedule: Schedule = field(default_factory=Linear)
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        # Beyond 1 random tokens would have to become clean again as m grows.
        if not (math.isfinite(self.shift) and 0 <= self.scale <= 1):
            raise ConfigError(
                f"shift={self.shift}, scale={self.scale}: expected a finite shift, and a scale "
                "from 0 to 1"
            )

    def noise(self, m: Tensor) -> Noise:
        """1 - m, m (1 - u), m u."""
        u = self._share(m)
        return Noise(1 - m, m * (1 - u), m * u)

    def slope(self, m: Tensor) -> Noise:
        """The derivatives, with u' = -scale u (1 - u) / (m (1 - m))."""
        u = self._share(m)
        fall = self.scale * u * (1 - u) / (1 - m)
        return Noise(-torch.ones_like(m), 1 - u + fall, u - fall)

    def _share(self, m: Tensor) -> Tensor:
        return torch.sigmoid(self.shift - self.scale * torch.logit(m, eps=2**-53))


PROCESSES: dict[str, Callable[..., Process]] = {
    kind.__name__.lower(): kind for kind in (Masking, Uniform, Mixed, Logistic)
}


def named_process(name: str, schedule: Schedule, /, **options: float) -> Process:
    """The process of that name, any case, on a schedule; ConfigError names the nearest.

    >>> named_process("mixed", Linear(), p_uniform=0.2).p_uniform
    0.2
    """
    return built("process", PROCESSES, name, options, schedule)


def noise_in_force(schedule: Schedule, process: Process | None) -> tuple[Schedule, Process | None]:
    """The schedule, a process's own before `schedule`, and the process but for `Masking`."""
    if process is None:
        return schedule, None
    return process.schedule, None if isinstance(process, Masking) else process


def ends_in_masks(process: Process) -> bool:
    """Whether at m = 1 all tokens are masks."""
    return float(process.noise(torch.ones((), dtype=torch.float64, device="cpu")).other) < 1e-6


class Ids(NamedTuple):
    """What each position may hold: of `ids` (K,), `number` (L,) of them from `first` (L,) on."""

    ids: Tensor
    first: Tensor
    number: Tensor

    @classmethod
    def of(cls, space: TokenSpace, length: int, device: torch.device | None = None) -> "Ids":
        """Those of canvases of `length` positions: permitted ids, of the position's part."""
        parts = space.parts or ((length, 0, space.vocab_size),)
        permitted = torch.ones(space.vocab_size, dtype=torch.bool, device="cpu")
        permitted[list(space.forbidden)] = False
        own = [permitted[start:stop].nonzero()[:, 0] + start for _, start, stop in parts]
        number = torch.tensor([len(each) for each in own], device="cpu")
        spread = torch.tensor([positions for positions, _, _ in parts], device="cpu")
        first = (number.cumsum(0) - number).repeat_interleave(spread)
        tables = (torch.cat(own), first, number.repeat_interleave(spread))
        return cls(*(table.to(device) for table in tables))

    def chosen(self, u: Tensor) -> Tensor:
        """One of them for each uniform u (B, L), (B, L) int64."""
        index = (u * self.number).long().minimum(self.number - 1)
        return self.ids[self.first + index]


def marginal(noise: Noise, prediction: Tensor, spread: Tensor, *, mask_id: int) -> Tensor:
    """q(. | prediction) at a level of noise, (..., C) with a column for the mask.

    `prediction` and `spread` (..., C) are laws of clean tokens, `spread` uniform over the ids that
    the position may hold; the shares are of shape (...).
    """
    keep, mask, other = (share.unsqueeze(-1) for share in noise)
    law = keep * prediction + other * spread
    law[..., mask_id] += mask.squeeze(-1)
    return law


def transition(
    at_t: Noise, at_s: Noise, z: Tensor, prediction: Tensor, spread: Tensor, *, mask_id: int
) -> Tensor:
    """The law (..., C) of the state at s given the states z (...) at t, more noise than s.

    q(z_t | z_s) q(z_s | prediction) / q(z_t | prediction), of a leave-one-out `prediction`: with
    it exact, of the true reverse process (von Rütte et al. 2025, eq. 9).
    """
    ratio = at_t.keep / at_s.keep
    column = z.unsqueeze(-1)

    def of(noise: Noise, law: Tensor) -> Tensor:
        return marginal(noise, law, spread, mask_id=mask_id).gather(-1, column)

    nothing = torch.zeros_like(prediction)
    fresh = of(at_t, nothing) - ratio.unsqueeze(-1) * of(at_s, nothing)
    ids = torch.arange(prediction.shape[-1], device=z.device)
    forward = fresh + ratio.unsqueeze(-1) * (ids == column)
    law = forward * marginal(at_s, prediction, spread, mask_id=mask_id)
    total = law.sum(-1, keepdim=True)
    return law / total


def leave_one_out(log_p: Tensor, z: Tensor, noise: Noise, count: Tensor, *, mask_id: int) -> Tensor:
    """The leave-one-out log-probabilities (N, V) of `posterior` ones, given the states z (N,).

    P(x | z) is proportional to P(x | z without i) q(z_i | x): at the standing id
    log(1 + keep n / other) is taken off. Where there are no random tokens (`LEAST_OTHER`) a token
    that is not hidden is known, and its row stays. `noise` (N,), `count` (N,) the ids n.
    """
    excess = torch.log1p(noise.keep * count / noise.other).to(log_p.dtype)
    excess = torch.where((z == mask_id) | (noise.other / count < LEAST_OTHER), 0.0, excess)
    column = z.clamp(max=log_p.shape[1] - 1)[:, None]
    return log_p.scatter_add(1, column, -excess[:, None]).log_softmax(1)


def cost(
    log_p: Tensor, x: Tensor, z: Tensor, at: tuple[Noise, Noise], count: Tensor, *, mask_id: int
) -> tuple[Tensor, Tensor]:
    """The terms of the bound of clean tokens x (N,) given states z (N,): (weight, nats), both (N,).

    The bound is the integral over m of the mean of weight * nats, with nats = KL(q(. | x),
    q(. | p)) + r - log r - 1, r = q(z | x) / q(z | p), and weight = rate(z) / q(z | x) (von Rütte
    et al. 2025, eq. 14). `log_p` (N, V) are leave-one-out log-probabilities, -inf where an id is
    not permitted; `at` is the noise (N,) and its slope; `count` (N,) the ids a position may hold.
    """
    (keep, mask, other), slope = at
    o, o_rise = other / count, slope.other / count
    o = torch.where(o < LEAST_OTHER, 0.0, o)
    leaves = -slope.keep / keep
    hidden, same = z == mask_id, z == x
    q = torch.where(hidden, mask, torch.where(same, keep, 0.0) + o)
    rate = torch.where(hidden, slope.mask + leaves * mask, o_rise + leaves * o)
    weight = torch.where(q > 0, rate / q, 0.0)
    dtype = log_p.dtype
    small = o.clamp(min=torch.finfo(torch.float64).tiny)
    odds = (keep / small).log()
    # How much more than a random token each id is, in log: log(q(v | p) / o).
    more = softplus(log_p + odds.to(dtype)[:, None])
    own = softplus(odds)
    more_x = more.gather(1, x[:, None])[:, 0]
    more_z = more.gather(1, z.clamp(max=more.shape[1] - 1)[:, None])[:, 0]
    keep, o, own = (each.to(dtype) for each in (keep, o, own))
    divergence = (keep + o) * own - keep * more_x - o * more.sum(1)
    # Zero before it is raised: in the branch that is not taken a gradient must be finite too.
    log_r = torch.where(hidden | (o == 0), 0.0, torch.where(same, own, 0.0) - more_z)
    spare = log_r.expm1() - log_r
    only_masks = -keep * log_p.gather(1, x[:, None])[:, 0]
    return weight, torch.where(o > 0, divergence + spare, only_masks)
