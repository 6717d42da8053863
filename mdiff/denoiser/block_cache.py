"""What a block model keeps of finished blocks, so that a step runs on one block alone."""

from __future__ import annotations

import torch
from torch import Tensor

from mdiff.denoiser.protocol import Cache, Condition, Denoiser, HasCache


def finished_blocks(
    denoiser: Denoiser, *, valid: Tensor | None, cond: Condition | None
) -> FinishedBlocks | None:
    """An empty cache of finished blocks for a batch of rows; None where none can be kept.

    The denoiser must give a cache, and rows must be without padding, so that they share where
    blocks begin, and without a condition.
    """
    padded = valid is not None and not bool(valid.all())
    if padded or cond or not isinstance(denoiser, HasCache):
        return None
    return FinishedBlocks(denoiser, denoiser.new_cache())


class FinishedBlocks:
    """The cache of one batch of rows: it grows by finished blocks and is read by the next."""

    def __init__(self, denoiser: Denoiser, cache: Cache) -> None:
        self.denoiser, self.cache = denoiser, cache
        # The last choice of rows: samplers ask for the same ones many times in a row.
        self.chosen: tuple[list[int], Cache] = ([], cache)

    def grow(self, canvas: Tensor, start: int) -> None:
        """Keep the positions of `canvas` (B, L) before `start`, in one pass over the new ones."""
        kept = self.cache.length
        if kept >= start:
            return
        tokens = canvas[:, kept:start]
        self.cache.growing = True
        try:
            self.denoiser(
                tokens, at=torch.zeros_like(tokens, dtype=torch.bool), cache=self.cache
            )  # fmt: skip
        finally:
            self.cache.growing = False
        self.chosen = ([], self.cache)

    def of_rows(self, rows: Tensor, *, total: int) -> Cache:
        """The cache for `rows` (N,) of the batch of `total` rows."""
        if len(rows) == total:
            return self.cache
        numbers = rows.tolist()
        if numbers != self.chosen[0]:
            self.chosen = (numbers, self.cache.of_rows(rows))
        return self.chosen[1]
