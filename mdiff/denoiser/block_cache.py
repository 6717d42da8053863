"""What a block model keeps of finished blocks, so that a step runs on one block alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser.protocol import Condition, Denoiser


def own_blocks(denoiser: Denoiser, block_length: int) -> bool:
    """Whether the denoiser is a block model of blocks of just that length."""
    return getattr(denoiser, "block_length", None) == block_length


def can_keep(denoiser: Denoiser, *, valid: Tensor | None, cond: Condition | None) -> bool:
    """Whether finished blocks of a batch can be kept.

    The denoiser must give a cache, and rows must be without padding, so that they share where
    blocks begin, and without a condition.
    """
    padded = valid is not None and not bool(valid.all())
    return hasattr(denoiser, "new_cache") and not padded and not cond


class FinishedBlocks:
    """The cache of one batch of rows: it grows by finished blocks and is read by the next."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.cache: Any = self.denoiser.new_cache()
        # The last choice of rows: samplers ask for the same ones many times in a row.
        self.chosen: tuple[list[int], Any] = ([], None)

    def grow(self, canvas: Tensor, start: int) -> None:
        """Keep the places before `start` of `canvas` (B, L); one pass over those not yet kept."""
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
        self.chosen = ([], None)

    def of_rows(self, rows: Tensor, *, total: int) -> Any:
        """The cache for `rows` (N,) of the batch of `total` rows."""
        if len(rows) == total:
            return self.cache
        numbers = rows.tolist()
        if numbers != self.chosen[0]:
            self.chosen = (numbers, self.cache.of_rows(rows))
        return self.chosen[1]
