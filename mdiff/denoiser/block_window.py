"""The denoiser of one block of a canvas, which a sampler fills as a canvas of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from mdiff.denoiser.calls import check_rows, evaluations, has_shadows, row_request, shadow_request
from mdiff.denoiser.protocol import Cache, Condition, Denoiser, RowBound, Rows
from mdiff.schedule import Schedule


class BlockWindow:
    """A Denoiser of one block of each row of `canvas` (B, L): it calls another on the canvas.

    `columns` (B, W) int64 are the positions of the block, `attended` (B, L) bool those that the
    other is given as valid, `writable` (B, L) bool those that were hidden at first. Where it uses
    the time, its `schedule` gives the one at which the share of `writable` that is still hidden,
    of what is attended to, would be expected.
    """

    def __init__(
        self, denoiser: Denoiser, canvas: Tensor, columns: Tensor, *, attended: Tensor,
        writable: Tensor, schedule: Schedule, mask_id: int,
    ) -> None:  # fmt: skip
        self.denoiser, self.canvas, self.columns = denoiser, canvas, columns
        self.attended, self.writable = attended, writable & attended
        self.schedule, self.mask_id = schedule, mask_id
        self.uses_time, self.request = denoiser.uses_time, row_request(denoiser)

    def for_rows(self, index: Tensor) -> BlockWindow:
        """The same for the rows `index` (N,) int64 alone."""
        inner = self.denoiser
        return BlockWindow(
            inner.for_rows(index) if isinstance(inner, RowBound) else inner,
            self.canvas[index], self.columns[index], attended=self.attended[index],
            writable=self.writable[index], schedule=self.schedule, mask_id=self.mask_id,
        )  # fmt: skip

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
    ) -> int | Tensor:
        """What the call costs each row: that of the whole canvas."""
        return evaluations(self.denoiser, self.around(tokens), valid=self.attended, cond=cond)

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
        """Logits (B, W, V) of the block's tokens (B, W), or (N, V) of its positions `at`."""
        whole = self.around(tokens)
        logits = self.denoiser(
            whole, at=None if at is None else self._on_canvas(at), valid=self.attended,
            t=self.time(whole, t), cond=cond, cache=cache,
        )  # fmt: skip
        if at is not None:
            return logits
        return logits.gather(1, self.columns[..., None].expand(-1, -1, logits.shape[2]))

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at` of the block; see `row_request`."""
        whole = self.around(tokens)
        return self.request(
            whole, at=self._on_canvas(at), number=number, valid=self.attended,
            t=self.time(whole, t), cond=cond,
        )  # fmt: skip

    def has_shadows(self) -> bool:
        """Whether the denoiser of the canvas gives rows by shadows."""
        return has_shadows(self.denoiser)

    def shadow_rows(
        self, tokens: Tensor, *, at: Tensor, mask_id: int, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at` of the block, those of tokens by shadows."""
        whole = self.around(tokens)
        return shadow_request(self.denoiser)(
            whole, at=self._on_canvas(at), mask_id=mask_id, number=number, valid=self.attended,
            t=self.time(whole, t), cond=cond,
        )  # fmt: skip

    def around(self, tokens: Tensor) -> Tensor:
        """The canvas with the block's tokens (B, W) in it; ConfigError for another B."""
        check_rows(tokens, len(self.canvas))
        return self.canvas.scatter(1, self.columns, tokens)

    def time(self, whole: Tensor, t: Tensor | None) -> Tensor | None:
        """The time (B,) of a canvas, in the type of the block's own time `t`; None for None."""
        if t is None:
            return None
        left = (self.writable & (whole == self.mask_id)).sum(1).double()
        return self.schedule.time_at(left / self.writable.sum(1).clamp(min=1)).to(t.dtype)

    def _on_canvas(self, at: Tensor) -> Tensor:
        """The positions `at` (B, W) of the block as positions of the canvas, (B, L) bool."""
        return torch.zeros_like(self.attended).scatter(1, self.columns, at)


class CachedBlock:
    """The same of a block model that keeps finished blocks: a call runs on the block alone.

    `before` gives the cache of the blocks before, of `window`'s rows; it is called once, when it
    is needed. The block is as wide as `width`; the columns of a shorter last one come first.
    """

    def __init__(self, window: BlockWindow, before: Callable[[], Cache], width: int) -> None:
        self.window, self.before, self.width = window, before, width
        self.uses_time = window.uses_time

    @cached_property
    def cache(self) -> Cache:
        """The blocks before this one."""
        return self.before()

    def for_rows(self, index: Tensor) -> CachedBlock:
        """The same for the rows `index` (N,) int64 alone."""
        rows = self.window.for_rows(index)
        return CachedBlock(rows, lambda: self.cache.of_rows(index), self.width)

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
    ) -> int | Tensor:
        """What the call costs each row."""
        return self.window.row_evaluations(tokens, valid=valid, cond=cond)

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
        """Logits (B, W, V) of the block's tokens (B, W), or (N, V) of its positions `at`."""
        at = None if at is None else at[:, : self.width]
        t = self.window.time(self.window.around(tokens), t)
        return self.window.denoiser(tokens[:, : self.width], at=at, t=t, cache=self.cache)

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at` of the block; see `row_request`."""
        t = self.window.time(self.window.around(tokens), t)
        return self.window.request(
            tokens[:, : self.width], at=at[:, : self.width], number=number, t=t, cache=self.cache
        )
