"""What training reads: rows of tokens by number, whatever medium they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows for one step, in the order asked for.

    `tokens` (B, L) int64 without masks; `valid` (B, L) bool, None where nothing is padding;
    `documents` (B, L) int64, None where a row is one document; `may_hide` (B, L) bool, None
    where everything may be hidden; `cond` tensors whose first axis is B.
    """

    tokens: Tensor
    valid: Tensor | None = None
    documents: Tensor | None = None
    may_hide: Tensor | None = None
    cond: dict[str, Tensor] = field(default_factory=dict)


class Examples(Protocol):
    """A tokenised data set of rows of one length, readable in any order.

    `fingerprint` is a hex digest of the tokens and of how they are cut into rows: a resumed
    run is refused where it differs. `units` is how many units of the medium, named `unit`, an
    average token stands for, for progress in bits a unit.
    """

    fingerprint: str
    length: int
    unit: str
    units: float

    def __len__(self) -> int:
        """How many rows an epoch has."""

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows number `rows` (B,) int64 of epochs `epoch` (B,); a function of the two alone."""
