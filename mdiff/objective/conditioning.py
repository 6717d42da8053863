"""Condition dropout, and which parts of a canvas are given in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.denoiser import Condition
from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.tokens import TokenSpace

JOINED = "+"
# Two uniforms of a row, by the position of their counters.
CONDITION, PARTS = 0, 1


def drop_condition(
    cond: Condition, *, null_condition: Condition, share: float, seed: int, sample: Tensor
) -> dict[str, Tensor]:
    """`cond` (B, ...) with the rows of a random `share` set to the null condition.

    A row loses all of its condition or none (Ho & Salimans 2022, algorithm 1: the share is the
    probability of *leaving it out*). Entries that `null_condition` does not name are kept. The
    coin of row b is that of (seed, sample[b]).
    """
    found = dict(cond)
    if not share or not null_condition:
        return found
    drop = philox.uniform(seed, CONDITION, sample, 0, purpose=philox.DROP) < share
    for name, null in null_condition.items():
        if name in found:
            value = found[name]
            shape = (-1, *[1] * (value.dim() - 1))
            found[name] = torch.where(drop.view(shape), null.to(value), value)
    return found


@dataclass(frozen=True)
class GivenParts:
    """Which parts of a canvas are given: subsets with their probabilities; see `of`.

    `cumulative` (subsets,) float64 are the cumulative probabilities, `hideable` (subsets, L) bool
    the positions that each subset leaves to be hidden.
    """

    cumulative: Tensor
    hideable: Tensor

    @classmethod
    def of(
        cls, shares: Mapping[str, float], *, space: TokenSpace, part_names: Sequence[str]
    ) -> GivenParts:
        """From {"": 2, "a": 1, "a+b": 1}: the names of given parts and how often, in proportion.

        Raises ConfigError for a name that is no part, or a subset that leaves nothing to hide.
        """
        if not space.parts or len(space.parts) != len(part_names):
            raise ConfigError(f"objective.given: this canvas has no parts: {list(part_names)}")
        if not shares or not all(math.isfinite(share) and share > 0 for share in shares.values()):
            raise ConfigError("objective.given: expected a positive share for each set of parts")
        length = sum(count for count, _, _ in space.parts)
        hideable = torch.stack([
            hideable_positions(name, length, space=space, part_names=part_names) for name in shares
        ])  # fmt: skip
        for name, row in zip(shares, hideable):
            if not bool(row.any()):
                raise ConfigError(f"objective.given: {name!r} leaves nothing to hide")
        weight = torch.tensor(list(shares.values()), dtype=torch.float64, device="cpu")
        return cls(weight.cumsum(0) / weight.sum(), hideable)

    def may_hide(self, *, seed: int, sample: Tensor) -> Tensor:
        """The positions (B, L) bool that the rows may hide, one subset a row by (seed, sample)."""
        u = philox.uniform(seed, PARTS, sample, 0, purpose=philox.DROP)
        chosen = torch.searchsorted(self.cumulative.to(u), u, right=True)
        return self.hideable.to(sample.device)[chosen.clamp(max=len(self.hideable) - 1)]


def hideable_positions(
    given: str, length: int, *, space: TokenSpace, part_names: Sequence[str]
) -> Tensor:
    """The positions (L,) bool outside the parts that `given` names, such as "a+b"; "" is none.

    >>> space = TokenSpace(4, mask_id=4, parts=((2, 0, 2), (1, 2, 4)))
    >>> hideable_positions("a", 3, space=space, part_names=["a", "b"]).tolist()
    [False, False, True]
    """
    free = torch.ones(length, dtype=torch.bool, device="cpu")
    for name in filter(None, given.split(JOINED)):
        if name not in part_names:
            raise ConfigError(f"unknown part {name!r}; {nearest(name, part_names)}")
        index = list(part_names).index(name)
        start = sum(count for count, _, _ in space.parts[:index])
        free[start : start + space.parts[index][0]] = False
    return free
