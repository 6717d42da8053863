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
    """The cache of one batch of rows, which grows by finished blocks."""

    def __init__(self, denoiser: Denoiser, cache: Cache) -> None:
        self.denoiser, self.cache = denoiser, cache

    def before(self, canvas: Tensor, start: int) -> Cache:
        """The cache of the positions of `canvas` (B, L) before `start`: one pass over new ones."""
        kept = self.cache.length
        if kept < start:
            tokens = canvas[:, kept:start]
            nowhere = torch.zeros_like(tokens, dtype=torch.bool)
            self.cache.growing = True
            try:
                self.denoiser(tokens, at=nowhere, cache=self.cache)
            finally:
                self.cache.growing = False
        return self.cache
