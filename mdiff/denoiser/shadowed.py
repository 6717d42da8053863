"""A denoiser whose rows of standing tokens are those of their shadows."""

from __future__ import annotations

from torch import Tensor

from mdiff.denoiser.calls import evaluations, has_shadows
from mdiff.denoiser.protocol import Cache, Condition, Denoiser, RowBound, Rows, ShadowPositions


class Shadowed:
    """A Denoiser that asks another, which has shadows, for the rows of `shadow_rows`.

    A call costs what the other's does, though its canvas is up to twice as long.
    """

    def __init__(self, denoiser: Denoiser, shadows: ShadowPositions, mask_id: int) -> None:
        """`shadows` is the same denoiser."""
        self.denoiser, self.shadows, self.mask_id = denoiser, shadows, mask_id
        self.uses_time = denoiser.uses_time

    def for_rows(self, index: Tensor) -> Denoiser:
        """The same for the rows `index` (N,) int64 alone."""
        if not isinstance(self.denoiser, RowBound):
            return self
        rows = self.denoiser.for_rows(index)
        shadows: object = rows
        return Shadowed(rows, shadows, self.mask_id) if has_shadows(shadows) else rows

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
    ) -> int | Tensor:
        """What a call costs each row."""
        return evaluations(self.denoiser, tokens, valid=valid, cond=cond)

    def __call__(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The logits of the denoiser itself, without shadows."""
        return self.denoiser(
            tokens, at=at, valid=valid, documents=documents, t=t, cond=cond, cache=cache
        )

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The rows at the positions `at`, those of tokens by their shadows."""
        return self.shadows.shadow_rows(
            tokens, at=at, mask_id=self.mask_id, number=number, valid=valid, t=t, cond=cond
        )
