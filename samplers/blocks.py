"""Blocks: fill the canvas block after block, each by another sampler (semi-autoregressive)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser import (
    Cache,
    Condition,
    Denoiser,
    FinishedBlocks,
    Rows,
    block_length_of,
    evaluations,
    finished_blocks,
    row_request,
)
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.samplers.first_hitting import first_hitting
from mdiff.sampling import State, streams
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace, ranks

# The entries under which a row's whole canvas travels with it to the denoiser.
CANVAS, COLUMNS, SEEN = "blocks.canvas", "blocks.columns", "blocks.seen"
WRITABLE, ROWS = "blocks.writable", "blocks.rows"


def blocks(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule = Linear(),  # noqa: B008
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    inner: Callable[..., Iterator[State]] = first_hitting,
    block_length: int = 32,
    steps: int | None = None,
    context: int | None = None,
    stop: int | None = None,
    **options: Any,
) -> Iterator[State]:
    """States of `inner` run on one block of `canvas` (B, L) after the other.

    A row's blocks are runs of `block_length` valid places from its first hidden place on
    (Nie et al. 2025, section 2.4; Arriola et al. 2025). `steps` counts per block and, like
    the other `options`, is handed to `inner`. By default the denoiser sees the whole canvas,
    later blocks hidden; with `context=n` it sees the n valid places that end with the block,
    so that a canvas may be longer than the training window. `stop` is the id that ends a sample:
    after the block that draws it, the row's later hidden places take that id without a call.

    With a block model of the same block_length the blocks are the model's own, counted from
    the first place of the row. Where it can keep finished blocks (`SequenceBackbone`), no row has
    padding, and there is neither a condition nor a context, each step runs on its block alone:
    same logits, same calls. A finished block costs one pass more, over its own places, which is
    not counted as a call; what is given before the first hidden block shares one such pass.

    A block after the first has a seed of its own, derived from the sample's. A denoiser that
    uses the time is told the share of what it sees that is still hidden.

    Raises ConfigError for block_length < 1, a context shorter than a block, or a stop id
    that the space does not have.
    """
    if block_length < 1:
        raise ConfigError(f"block_length={block_length}: need at least 1")
    if context is not None and context < block_length:
        raise ConfigError(f"context={context}: need at least block_length={block_length}")
    if stop is not None and not 0 <= stop < space.vocab_size:
        raise ConfigError(f"stop={stop}: expected an id below {space.vocab_size}")
    if space.parts:
        raise ConfigError("blocks: a canvas of parts is sampled whole")
    if inner is blocks:
        raise ConfigError("blocks: the inner sampler fills one block, it cannot be blocks")
    space.check(canvas, valid)
    if steps is not None:
        if "steps" not in signature(inner).parameters:
            raise ConfigError(
                f"steps={steps}: {inner.__name__}, the inner sampler, takes no steps; "
                "inner='confidence' and inner='ancestral' do"
            )
        options["steps"] = steps
    canvas = canvas.clone()
    seen = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
    writable = seen & (canvas == space.mask_id)
    rank = ranks(canvas, valid)
    aligned = block_length_of(denoiser) == block_length
    block = _blocks(canvas, seen, rank, block_length, space.mask_id, aligned=aligned)
    finished = None
    if aligned and context is None:
        finished = finished_blocks(denoiser, valid=valid, cond=cond)
    seeds, samples = streams(seed, len(canvas), canvas.device)
    calls = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
    states, filled_up = 0, False
    number = torch.arange(len(canvas), device=canvas.device)
    for index in range(_first_block(block, writable), int(block.max()) + 1):
        inside = block == index
        width = min(block_length, canvas.shape[1])
        columns = (~inside).long().argsort(dim=1, stable=True)[:, :width]
        shown = seen if context is None else seen & _ends_with(inside, rank, context)
        last: State | None = None
        window = _Window(denoiser, schedule, space.mask_id)
        if finished is not None:
            window = _Alone(window, finished, canvas, index * block_length)
        for last in inner(
            window,
            canvas.gather(1, columns),
            space=space,
            schedule=schedule,
            seed=seed if index == 0 else philox.derive(seeds, samples, index),
            valid=inside.gather(1, columns),
            cond={
                **(cond or {}), CANVAS: canvas, COLUMNS: columns, SEEN: shown,
                WRITABLE: writable, ROWS: number,
            },
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            **options,
        ):  # fmt: skip
            states += 1
            yield _whole(last, canvas, columns, states, calls)
        if last is not None:
            canvas = canvas.scatter(1, columns, last.tokens)
            calls = calls + last.calls
        if stop is not None:
            ended = (inside & writable & (canvas == stop)).any(1, keepdim=True)
            rest = ended & (block > index) & (canvas == space.mask_id)
            canvas = torch.where(rest, stop, canvas)
            block = torch.where(ended & (block > index), -1, block)
            filled_up = filled_up or bool(rest.any())
    if filled_up:
        yield _stopped(canvas, calls, states + 1)


class _Window:
    """A Denoiser of one block: it puts the block into the row's canvas and asks there."""

    def __init__(self, denoiser: Denoiser, schedule: Schedule, mask_id: int) -> None:
        self.denoiser, self.schedule, self.mask_id = denoiser, schedule, mask_id
        self.uses_time, self.request = denoiser.uses_time, row_request(denoiser)

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
    ) -> int | Tensor:
        """What the call costs each row: the model sees the whole canvas."""
        rest = dict(cond or {})
        whole = rest.pop(CANVAS).scatter(1, rest.pop(COLUMNS), tokens)
        seen = rest.pop(SEEN)
        del rest[WRITABLE], rest[ROWS]
        return evaluations(self.denoiser, whole, valid=seen, cond=rest or None)

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
        """Logits (N, V) of the places `at` of the block."""
        whole, seen, t, rest = self._around(tokens, t, cond)
        asked = None if at is None else self._asked(at, seen, cond)
        return self.denoiser(whole, at=asked, valid=seen, t=t, cond=rest, cache=cache)

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at` of the block; see `row_request`."""
        whole, seen, t, rest = self._around(tokens, t, cond)
        asked = self._asked(at, seen, cond)
        return self.request(whole, at=asked, number=number, valid=seen, t=t, cond=rest)

    def _around(
        self, tokens: Tensor, t: Tensor | None, cond: Condition | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Condition | None]:
        """The whole canvas, what of it is seen, its own time and the condition that is left."""
        rest = dict(cond or {})
        canvas, columns, seen = (rest.pop(name) for name in (CANVAS, COLUMNS, SEEN))
        writable = rest.pop(WRITABLE) & seen
        del rest[ROWS]
        whole = canvas.scatter(1, columns, tokens)
        if t is not None:
            # The time is that of all the model sees: the share of it that is still hidden.
            left = (writable & (whole == self.mask_id)).sum(1).double()
            t = self.schedule.time_at(left / writable.sum(1).clamp(min=1)).to(t.dtype)
        return whole, seen, t, rest or None

    @staticmethod
    def _asked(at: Tensor, seen: Tensor, cond: Condition | None) -> Tensor:
        """The places `at` of the block as places of the canvas, (B, L) bool."""
        return torch.zeros_like(seen).scatter(1, (cond or {})[COLUMNS], at)


class _Alone(_Window):
    """The same of a block model that keeps finished blocks: it asks of the block's places alone.

    `start` is the first place of the block in the whole batch of canvases (B, L).
    """

    def __init__(
        self, window: _Window, finished: FinishedBlocks, canvas: Tensor, start: int
    ) -> None:
        super().__init__(window.denoiser, window.schedule, window.mask_id)
        self.finished, self.canvas, self.start = finished, canvas, start

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
        """Logits (N, V) of the places `at` of the block."""
        own, asked, t, kept = self._block(tokens, at, t, cond)
        return self.denoiser(own, at=asked, t=t, cache=kept)

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at` of the block; see `row_request`."""
        own, asked, t, kept = self._block(tokens, at, t, cond)
        return self.request(own, at=asked, number=number, t=t, cache=kept)

    def _block(
        self, tokens: Tensor, at: Any, t: Tensor | None, cond: Condition | None
    ) -> tuple[Tensor, Any, Tensor | None, Any]:
        """The block's tokens and asked places, its time, and what is kept of those before."""
        self.finished.grow(self.canvas, self.start)
        _, _, t, _ = self._around(tokens, t, cond)
        rows, total = (cond or {})[ROWS], len(self.canvas)
        # The last block of a canvas may be short; its columns come first.
        width = min(tokens.shape[1], self.canvas.shape[1] - self.start)
        asked = None if at is None else at[:, :width]
        return tokens[:, :width], asked, t, self.finished.of_rows(rows, total=total)


def _blocks(
    canvas: Tensor, seen: Tensor, rank: Tensor, length: int, mask_id: int, *, aligned: bool
) -> Tensor:
    """The block of each place, (B, L) int64, counted from the row's first hidden one; else -1.

    With `aligned` they are counted from the row's first place.
    """
    if aligned:
        return torch.where(seen, rank // length, -1)
    hidden = seen & (canvas == mask_id)
    first = torch.where(hidden, rank, canvas.shape[1]).amin(1, keepdim=True)
    return torch.where(seen & (rank >= first), (rank - first) // length, -1)


def _first_block(block: Tensor, writable: Tensor) -> int:
    """The first block in which any row has a place to write."""
    wanted = block[writable]
    return int(wanted.min()) if wanted.numel() else 0


def _ends_with(inside: Tensor, rank: Tensor, context: int) -> Tensor:
    """The `context` places of each row that end where its block ends, (B, L) bool."""
    end = torch.where(inside, rank, -1).amax(1, keepdim=True)
    return (rank <= end) & (rank > end - context)


def _whole(state: State, canvas: Tensor, columns: Tensor, states: int, calls: Tensor) -> State:
    """The state of a block as a state of the whole canvas."""

    def spread(values: Tensor) -> Tensor:
        blank = torch.zeros(canvas.shape, dtype=values.dtype, device=values.device)
        return blank.scatter(1, columns, values)

    return State(
        canvas.scatter(1, columns, state.tokens), state.t, states, calls + state.calls,
        spread(state.revealed), spread(state.log_prob), spread(state.entropy),
    )  # fmt: skip


def _stopped(canvas: Tensor, calls: Tensor, states: int) -> State:
    """The last state, in which ended samples are filled up and nothing is drawn."""
    nothing = torch.zeros(canvas.shape, dtype=torch.float32, device=canvas.device)
    return State(
        canvas, torch.zeros_like(calls, dtype=torch.float64), states, calls,
        nothing.bool(), nothing, nothing,
    )  # fmt: skip
