"""Blocks: fill the canvas block after block, each by another sampler (semi-autoregressive)."""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from mdiff.denoiser import (
    BlockWindow,
    CachedBlock,
    Condition,
    Denoiser,
    FinishedBlocks,
    block_length_of,
    finished_blocks,
)
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.samplers.first_hitting import first_hitting
from mdiff.sampling import State, free_positions, streams
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace, ranks


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
    given: Tensor | None = None,
    inner: Callable[..., Iterator[State]] = first_hitting,
    block_length: int = 32,
    steps: int | None = None,
    context: int | None = None,
    stop: int | None = None,
    **options: object,
) -> Iterator[State]:
    """States of `inner` run on one block of `canvas` (B, L) after the other.

    A row's blocks are runs of `block_length` valid positions from its first hidden one on
    (Nie et al. 2025, section 2.4; Arriola et al. 2025). `steps` counts per block and, like
    the other `options`, is handed to `inner`. By default the denoiser is given the whole canvas,
    later blocks hidden; with `context=n` the n valid positions that end with the block, so that a
    canvas may be longer than the training window. `stop` is the id that ends a sample: after the
    block that draws it, the row's later hidden positions take that id without a call.

    With a block model of the same block_length the blocks are the model's own, counted from
    the first position of the row. Where it can keep finished blocks (`HasCache`), no row has
    padding, and there is neither a condition nor a context, each step runs on its block alone:
    same logits, same calls. A finished block costs one pass more, over its own positions, which is
    not counted as a call; what is given before the first hidden block shares one such pass.

    A block after the first has a seed of its own, derived from the sample's.

    Raises ConfigError for block_length < 1, a context shorter than a block, a stop id that the
    space does not have, or steps that `inner` does not take.
    """
    if steps is not None:
        options["steps"] = steps
    _check(space, inner, options, block_length=block_length, context=context, stop=stop)
    space.check(canvas, valid)
    aligned = block_length_of(denoiser) == block_length
    free = free_positions(canvas, given, valid, mask_id=space.mask_id)
    run = _Run(canvas, valid, free, space.mask_id, block_length, aligned=aligned)
    kept = None
    if aligned and context is None:
        kept = finished_blocks(denoiser, valid=valid, cond=cond)
    seeds, samples = streams(seed, len(canvas), canvas.device)
    for number in run.numbers():
        columns = run.columns(number)
        window = BlockWindow(
            denoiser, run.canvas, columns, attended=run.attended(number, context),
            writable=run.writable, schedule=schedule, mask_id=space.mask_id,
        )  # fmt: skip
        states = inner(
            window if kept is None else run.alone(window, number, kept),
            run.canvas.gather(1, columns), space=space.checked(), schedule=schedule,
            seed=philox.derive(seeds, samples, number) if number else seed,
            valid=(run.block == number).gather(1, columns), cond=cond,
            given=None if given is None else ~run.writable.gather(1, columns),
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **options,
        )  # fmt: skip
        yield from run.fill(states, columns)
        if stop is not None:
            run.end(number, stop)
    if run.filled_up:
        yield run.stopped()


def _check(
    space: TokenSpace, inner: Callable[..., Iterator[State]], options: dict[str, object], *,
    block_length: int, context: int | None, stop: int | None,
) -> None:  # fmt: skip
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
    if "steps" in options and "steps" not in signature(inner).parameters:
        raise ConfigError(
            f"steps={options['steps']}: {inner.__name__}, the inner sampler, takes no steps; "
            "inner='confidence' and inner='ancestral' do"
        )


class _Run:
    """A batch of canvases (B, L) and how far it is filled.

    `block` (B, L) int64 is the block of each position, counted from the row's first hidden one,
    or from its first one where they are `aligned`; -1 where it is in none.
    """

    def __init__(
        self, canvas: Tensor, valid: Tensor | None, free: Tensor, mask_id: int, length: int, *,
        aligned: bool,
    ) -> None:  # fmt: skip
        self.canvas, self.mask_id, self.length = canvas.clone(), mask_id, length
        self.valid = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
        self.writable = free
        self.rank = ranks(canvas, valid)
        first = torch.where(self.writable, self.rank, canvas.shape[1]).amin(1, keepdim=True)
        first = torch.zeros_like(first) if aligned else first
        inside = self.valid & (self.rank >= first)
        self.block = torch.where(inside, (self.rank - first) // length, -1)
        self.calls = torch.zeros(len(canvas), dtype=torch.int64, device=canvas.device)
        self.rounds, self.exact = self.calls, True
        self.states, self.filled_up = 0, False

    def numbers(self) -> range:
        """The blocks from the first in which any row has a position to write."""
        wanted = self.block[self.writable]
        first = int(wanted.min()) if wanted.numel() else 0
        return range(first, int(self.block.max()) + 1)

    def columns(self, number: int) -> Tensor:
        """The positions of a block, (B, W) int64, those of other blocks behind its own."""
        width = min(self.length, self.canvas.shape[1])
        return (self.block != number).long().argsort(dim=1, stable=True)[:, :width]

    def attended(self, number: int, context: int | None) -> Tensor:
        """The `context` valid positions of each row that end with its block, (B, L) bool."""
        if context is None:
            return self.valid
        end = torch.where(self.block == number, self.rank, -1).amax(1, keepdim=True)
        return self.valid & (self.rank <= end) & (self.rank > end - context)

    def alone(self, window: BlockWindow, number: int, kept: FinishedBlocks) -> CachedBlock:
        """The window of a block whose calls run on it alone."""
        start = number * self.length
        before = partial(kept.before, self.canvas, start)
        return CachedBlock(window, before, min(self.length, self.canvas.shape[1] - start))

    def fill(self, states: Iterator[State], columns: Tensor) -> Iterator[State]:
        """The states of a block as states of the whole canvas, which is filled by the last."""
        canvas, calls, rounds = self.canvas, self.calls, self.rounds

        def spread(values: Tensor) -> Tensor:
            blank = torch.zeros(canvas.shape, dtype=values.dtype, device=values.device)
            return blank.scatter(1, columns, values)

        for state in states:
            self.states += 1
            self.canvas = canvas.scatter(1, columns, state.tokens)
            self.calls, self.rounds = calls + state.calls, rounds + state.rounds
            self.exact = self.exact and state.log_prob_is_exact
            yield State(
                self.canvas, state.t, self.states, self.calls, self.rounds, self.exact,
                *map(spread, state.by_position()), state.in_turn,
            )  # fmt: skip

    def end(self, number: int, stop: int) -> None:
        """Fill rows up with `stop` that drew it in this block; they have no later blocks."""
        drawn = (self.block == number) & self.writable & (self.canvas == stop)
        later = drawn.any(1, keepdim=True) & (self.block > number)
        rest = later & (self.canvas == self.mask_id)
        self.canvas = torch.where(rest, stop, self.canvas)
        self.block = torch.where(later, -1, self.block)
        self.filled_up = self.filled_up or bool(rest.any())

    def stopped(self) -> State:
        """The last state, in which ended samples are filled up and nothing is drawn."""
        no = torch.zeros(self.canvas.shape, dtype=torch.bool, device=self.canvas.device)
        zero = no.float()
        return State(
            self.canvas, torch.zeros_like(self.calls, dtype=torch.float64), self.states + 1,
            self.calls, self.rounds, self.exact, no, zero, zero, zero, no, no,
        )  # fmt: skip
