"""How strong guidance is: a scale, and how it depends on the share that is hidden."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.errors import ConfigError, nearest
from mdiff.tokens import TokenSpace

# So times a difference of logits is still a float32.
LARGEST_SCALE = 1e30
# g(h) of `guided`: (B,) from the hidden share of each row (B,).
Ramp = Callable[[Tensor], Tensor]
RAMPS: dict[str, Ramp | None] = {
    "constant": None,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 - torch.cos(math.pi * (1 - share))) / 2,
}


class Strength(NamedTuple):
    """The guidance scale s and, where it depends on the hidden share, g(h) and its space."""

    scale: float
    ramp: Ramp | None = None
    space: TokenSpace | None = None

    def of_rows(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """The scale of each row (B,) float64, by the share of its valid positions now hidden."""
        if self.ramp is None or self.space is None:
            return torch.full_like(tokens[:, 0], self.scale, dtype=torch.float64)
        hidden = tokens == self.space.mask_id
        inside = torch.ones_like(hidden) if valid is None else valid
        share = (hidden & inside).sum(1).double() / inside.sum(1).clamp(min=1)
        grown = torch.as_tensor(self.ramp(share), device=tokens.device)
        return 1 + (self.scale - 1) * grown.expand(share.shape)


def strength_of(
    guidance_scale: float | None,
    cfg_scale: float | None = None,
    schedule: str | Ramp = "constant",
    interval: tuple[float, float] | None = None,
    space: TokenSpace | None = None,
) -> Strength:
    """The options of `guided` that say how strong guidance is, checked as it says."""
    if (guidance_scale is None) == (cfg_scale is None):
        raise ConfigError("guided: give guidance_scale or cfg_scale, exactly one of the two")
    scale = guidance_scale if guidance_scale is not None else 1.0 + float(cfg_scale or 0.0)
    if not abs(scale) <= LARGEST_SCALE:
        raise ConfigError(
            f"guidance_scale={scale}: expected a finite number of at most {LARGEST_SCALE:g}"
        )
    ramp = _ramp(schedule, interval)
    if ramp is not None and space is None:
        raise ConfigError("guided: guidance_schedule= needs the space, for its mask id")
    return Strength(scale, ramp, space)


def _ramp(schedule: str | Ramp, interval: tuple[float, float] | None) -> Ramp | None:
    """The g(h) of `guided`; None where it is 1 throughout."""
    if (schedule == "interval") != (interval is not None):
        raise ConfigError("guided: guidance_schedule='interval' and interval=(lo, hi) go together")
    if interval is not None:
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ConfigError(f"interval={interval}: expected (lo, hi) with 0 <= lo < hi <= 1")
        lo, hi = interval
        return lambda share: ((share > lo) & (share <= hi)).double()
    if callable(schedule):
        return schedule
    if schedule not in RAMPS:
        known = [*RAMPS, "interval"]
        raise ConfigError(f"unknown guidance schedule {schedule!r}; {nearest(schedule, known)}")
    return RAMPS[schedule]
