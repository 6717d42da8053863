"""Which rows a step reads: a function of the seed and the step alone, on any number of machines."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mdiff.kernels import philox


def epoch_order(rows: int, *, epoch: int, seed: int) -> Tensor:
    """A permutation of the row numbers (rows,) int64, its own for each epoch.

    Rows are sorted by 63 random bits each, so that ties are out of the question.

    >>> sorted(epoch_order(4, epoch=1, seed=0).tolist())
    [0, 1, 2, 3]
    """
    return _epoch_order(rows, epoch, seed)


# A step reads from two epochs at the seam between them.
@lru_cache(maxsize=2)
def _epoch_order(rows: int, epoch: int, seed: int) -> Tensor:
    lane = philox.SHUFFLE << 24
    high, low, _, _ = philox.words(seed, torch.arange(rows), 0, epoch, lane)
    return ((high & 0x7FFFFFFF) << 32 | low).argsort(stable=True)


def rows_of_step(step: int, *, batch_size: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The row numbers and epochs, both (batch_size,) int64, that step 1, 2, ... reads.

    The epochs' permutations follow each other and are cut every `batch_size` rows: each row
    is read once an epoch, no row is dropped, and a step may span the end of an epoch.
    """
    place = torch.arange((step - 1) * batch_size, step * batch_size)
    epoch = place // rows
    row = torch.empty_like(place)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        here = epoch == number
        row[here] = epoch_order(rows, epoch=number, seed=seed)[place[here] % rows]
    return row, epoch
