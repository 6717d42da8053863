"""Canvases of different lengths stacked into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mdiff.data import Batch
from mdiff.errors import ConfigError, DataError
from mdiff.tokens import TokenSpace


def continued(given: Sequence[int], length: int | None, *, mask_id: int) -> list[int]:
    """The given tokens followed by masks, `length` places in all (None: no masks).

    Raises ConfigError for a length below 1 and DataError where the tokens hold the mask or do
    not fit the canvas.

    >>> continued([3, 1], 4, mask_id=5)
    [3, 1, 5, 5]
    """
    if length is None:
        length = len(given)
    if length < 1:
        raise ConfigError(f"length={length}: need at least 1")
    if mask_id in given:
        raise DataError(f"the given tokens hold the mask id {mask_id}")
    if len(given) > length:
        raise DataError(
            f"{len(given)} given tokens do not fit a canvas of {length}; "
            f"raise the length to more than {len(given)}"
        )
    return [*given, *[mask_id] * (length - len(given))]


def stack(rows: Sequence[Sequence[int]], *, space: TokenSpace) -> tuple[Tensor, Tensor | None]:
    """Rows of any lengths as a batch: tokens (B, L) int64 and valid (B, L) bool.

    Shorter rows are padded on the right with id 0; valid is None where none is.

    >>> stack([[1], [2, 3]], space=TokenSpace(5, mask_id=5))[1].tolist()
    [[True, False], [True, True]]
    """
    if not rows or not all(len(row) for row in rows):
        raise ConfigError("an empty canvas: need at least 1 row and 1 place in each")
    sizes = torch.tensor([len(row) for row in rows], device="cpu")
    valid = torch.arange(int(sizes.max()), device="cpu") < sizes[:, None]
    tokens = torch.zeros(valid.shape, dtype=torch.int64, device="cpu")
    tokens[valid] = torch.tensor(
        [token for row in rows for token in row], dtype=torch.int64, device="cpu"
    )
    space.check(tokens, valid)
    return tokens, None if bool(valid.all()) else valid


def stack_conditions(
    told: Sequence[Mapping[str, int | Tensor]], without: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The conditions of a batch as tensors (B, ...); where a row has none, what says nothing.

    `without` are (1, ...), what `told` gives of a row (...), or a whole number.
    """
    if not any(told):
        return {}
    return {
        name: torch.stack(
            [torch.as_tensor(row.get(name, nothing[0]), device="cpu") for row in told]
        )
        for name, nothing in without.items()
    }


@dataclass(frozen=True)
class Windows:
    """Rows of any lengths, read by number in batches, as data.Examples are.

    `owner` says of which item each row is a window; `cond` tensors have a row's entry each.
    """

    rows: list[list[int]]
    owner: list[int]
    space: TokenSpace
    cond: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 padded to the longest; the same in every epoch."""
        tokens, valid = stack([self.rows[row] for row in rows.tolist()], space=self.space)
        cond = {name: tensor[rows] for name, tensor in self.cond.items()}
        return Batch(tokens, valid=valid, cond=cond)
