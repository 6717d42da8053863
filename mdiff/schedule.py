"""Schedules: how much is hidden at time t, from 0 (clean) to 1 (all hidden).

A schedule is m(t), increasing, with m(0) = 0 and m(1) = 1: the literature's 1 - alpha(t).
Its ELBO weight is w(t) = m'(t) / m(t) in closed form (Shi et al. 2024, eq. 4; Sahoo et al.
2024, eq. 10), with no epsilon. All is computed in float64 and returned in the type given.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from numbers import Real
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from mdiff.errors import ConfigError, nearest

# The smallest time: the smallest uniform that the counter-based stream can give.
MIN_TIME = 2.0**-32
# Beyond this total noise 1 - m is below the rounding of float64, and m has no inverse at 1.
STEEPEST = 36.0

Built = TypeVar("Built")


class Schedule(Protocol):
    """A hiding probability, its ELBO weight and its inverse, elementwise on any shape."""

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t), for t in [0, 1]."""

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = m'(t) / m(t), for t in [2^-32, 1]; finite and not negative."""

    def time_at(self, m: Tensor | float) -> Tensor:
        """The t with m(t) = m, in float64."""


def _float64(formula: Callable[[Tensor], Tensor], value: Tensor | float) -> Tensor:
    """The formula in float64, in the floating type of `value` (float64 for a number)."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return formula(value.double()).to(value.dtype)
    return formula(as_float64(value))


@dataclass(frozen=True)
class Linear:
    """m = t, w = 1 / t (the log-linear noise of MDLM, the schedule of LLaDA).

    >>> float(Linear().weight(0.25))
    4.0
    """

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = t."""
        return _float64(lambda t: t, t)

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = 1 / t."""
        return _float64(lambda t: 1 / t, t)

    def time_at(self, m: Tensor | float) -> Tensor:
        """The inverse: t = m."""
        return as_float64(m)


@dataclass(frozen=True)
class Cosine:
    """m = sin(pi t / 2), w = (pi / 2) / tan(pi t / 2).

    MaskGIT's cos(pi r / 2) (Chang et al. 2022, section 3.3) with r = 1 - t.
    """

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = sin(pi t / 2)."""
        return _float64(lambda t: torch.sin(math.pi / 2 * t), t)

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = (pi / 2) / tan(pi t / 2), 0 at t = 1."""
        return _float64(_half_pi_cotangent, t)

    def time_at(self, m: Tensor | float) -> Tensor:
        """The inverse: t = (2 / pi) asin m."""
        return torch.asin(as_float64(m)) * (2 / math.pi)


def _half_pi_cotangent(t: Tensor) -> Tensor:
    """(pi / 2) cot(pi t / 2); from 1 - t, which is exact there, where t is past one half."""
    late = torch.tan(math.pi / 2 * (1 - t))
    early = 1 / torch.tan(math.pi / 2 * t)
    return math.pi / 2 * torch.where(t < 0.5, early, late).clamp(min=0)


@dataclass(frozen=True)
class Polynomial:
    """m = t^p, w = p / t (Shi et al. 2024, table 4)."""

    power: float = 2.0

    def __post_init__(self) -> None:
        _positive("power", self.power)

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = t^p."""
        return _float64(lambda t: t**self.power, t)

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = p / t."""
        return _float64(lambda t: self.power / t, t)

    def time_at(self, m: Tensor | float) -> Tensor:
        """The inverse: t = m^(1/p)."""
        return as_float64(m) ** (1 / self.power)


@dataclass(frozen=True)
class Arccos:
    """m = (4 / pi) asin sqrt(t / 2), w = 1 / (2 sqrt(t (2 - t)) asin sqrt(t / 2)).

    The arccos reveal of Halton-MaskGIT (Besnier et al. 2025), (2 / pi) acos r, with r = 1 - t.
    """

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = (4 / pi) asin sqrt(t / 2)."""
        return _float64(lambda t: (4 / math.pi * torch.asin(torch.sqrt(t / 2))).clamp(max=1), t)

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = 1 / (2 sqrt(t (2 - t)) asin sqrt(t / 2))."""
        return _float64(
            lambda t: 0.5 / (torch.sqrt(t * (2 - t)) * torch.asin(torch.sqrt(t / 2))), t
        )

    def time_at(self, m: Tensor | float) -> Tensor:
        """The inverse: t = 2 sin^2(pi m / 4)."""
        return 2 * torch.sin(math.pi / 4 * as_float64(m)) ** 2


@dataclass(frozen=True)
class Exponential:
    """m = expm1(-a t) / expm1(-a), w = a / expm1(a t): much is hidden early."""

    rate: float = 5.0

    def __post_init__(self) -> None:
        _positive("rate", self.rate)
        if self.rate > STEEPEST:
            raise ConfigError(f"rate={self.rate}: expected at most {STEEPEST}, m(t) is 1 beyond")

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = expm1(-a t) / expm1(-a)."""
        return _float64(lambda t: torch.expm1(-self.rate * t) / math.expm1(-self.rate), t)

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = a / expm1(a t)."""
        return _float64(lambda t: self.rate / torch.expm1(self.rate * t), t)

    def time_at(self, m: Tensor | float) -> Tensor:
        """The inverse: t = -log1p(m expm1(-a)) / a."""
        return torch.log1p(as_float64(m) * math.expm1(-self.rate)) / -self.rate


@dataclass(frozen=True)
class Geometric:
    """m = expm1(-s) / expm1(lo - hi), w = ln(hi / lo) (lo + s) / expm1(s).

    s(t) = lo expm1(t ln(hi / lo)) is the total noise of SEDD's geometric schedule (Lou et
    al. 2024, appendix C.1), shifted and scaled so that the ends hold exactly.
    """

    lo: float = 1e-5
    hi: float = 20.0

    def __post_init__(self) -> None:
        _positive("lo", self.lo)
        _positive("hi", self.hi)
        if self.lo >= self.hi:
            raise ConfigError(f"lo={self.lo}, hi={self.hi}: need lo < hi")
        if self.hi - self.lo > STEEPEST:
            raise ConfigError(f"hi={self.hi}: expected hi - lo of at most {STEEPEST}")

    def _noise(self, t: Tensor) -> Tensor:
        return self.lo * torch.expm1(t * math.log(self.hi / self.lo))

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = expm1(-s) / expm1(lo - hi)."""
        return _float64(lambda t: torch.expm1(-self._noise(t)) / math.expm1(self.lo - self.hi), t)

    def weight(self, t: Tensor | float) -> Tensor:
        """w(t) = ln(hi / lo) (lo + s) / expm1(s)."""

        def formula(t: Tensor) -> Tensor:
            noise = self._noise(t)
            return math.log(self.hi / self.lo) * (self.lo + noise) / torch.expm1(noise)

        return _float64(formula, t)

    def time_at(self, m: Tensor | float) -> Tensor:
        """The inverse: t = log1p(s / lo) / ln(hi / lo), s = -log1p(m expm1(lo - hi))."""
        noise = -torch.log1p(as_float64(m) * math.expm1(self.lo - self.hi))
        return torch.log1p(noise / self.lo) / math.log(self.hi / self.lo)


def as_float64(value: Tensor | float) -> Tensor:
    """The value in float64, a number on the CPU whatever the default device is."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _huge(value: object) -> bool:
    """Whether a whole number is none of float64's."""
    return isinstance(value, int) and abs(value) > sys.float_info.max


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}={value}: expected a positive number")


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    kind.__name__.lower(): kind
    for kind in (Linear, Cosine, Polynomial, Arccos, Exponential, Geometric)
}


def named_schedule(name: str, **options: float) -> Schedule:
    """The schedule of that name, any case; ConfigError lists the nearest one.

    >>> named_schedule("polynomial", power=3.0)
    Polynomial(power=3.0)
    """
    return built("schedule", SCHEDULES, name, options)


def built(
    what: str, known: Mapping[str, Callable[..., Built]], name: str, options: Mapping[str, object],
    *given: object,
) -> Built:  # fmt: skip
    """The kind of that name, any case, of `given` and options that are numbers.

    Raises ConfigError with the nearest name, or the option that is wrong.
    """
    kind = known.get(name.lower())
    if kind is None:
        raise ConfigError(f"unknown {what} {name!r}; {nearest(name.lower(), known)}")
    try:
        signature(kind).bind(*given, **options)
    except TypeError:
        raise ConfigError(f"{what} {name!r} does not take {sorted(options)}") from None
    for key, value in options.items():
        if type(value) is bool or not isinstance(value, Real) or _huge(value):
            raise ConfigError(f"{what} {name!r}: {key}={str(value)[:40]}: expected a number")
    return kind(*given, **options)
