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
    seeds_blocks,
)
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.process import Process, ends_in_masks
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
    sub_block_length: int | None = None,
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
    block that draws it, the row's later hidden positions take that id without a call. With a
    `sub_block_length` a block is filled by such runs, and `steps` counts in each (Fast-dLLM v2).

    With a block model of the same block_length the blocks are the model's own, counted from
    the first position of the row. Where it can keep finished blocks (`HasCache`), no row has
    padding, and there is neither a condition nor a context, each step runs on its block alone:
    same logits, same calls. A finished block costs one pass more, over its own positions, which is
    not counted as a call; what is given before the first hidden block shares one such pass. Where a
    block's first token is from the block before (`SeedsBlocks`), that one is drawn first. A block
    after the first, and each later part, has a seed of its own, derived from the sample's.

    Raises ConfigError for lengths that do not fit, a stop id that the space does not have, or
    steps that `inner` does not take.
    """
    options |= {} if steps is None else {"steps": steps}
    lengths = (block_length, block_length if sub_block_length is None else sub_block_length)
    _check(space, inner, options, lengths=lengths, context=context, stop=stop)
    space.check(canvas, valid)
    aligned = block_length_of(denoiser) == block_length
    free = free_positions(canvas, given, valid, mask_id=space.mask_id)
    run = _Run(canvas, valid, free, space.mask_id, block_length, aligned=aligned)
    if aligned and context is None:
        run.kept = finished_blocks(denoiser, valid=valid, cond=cond)
    seeds, samples = streams(seed, len(canvas), canvas.device)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    seeded = aligned and seeds_blocks(denoiser)
    for number in run.numbers():
        for part, own in enumerate(run.parts(number, lengths[1], seeded=seeded)):
            alone = seeded and part == 0
            columns = run.columns(number)[:, : 1 if alone else None]
            states = (first_hitting if alone else inner)(
                run.window(denoiser, number, columns, schedule, context),
                run.canvas.gather(1, columns), space=space.checked(), schedule=schedule,
                seed=philox.derive(seeds, samples, number, part) if number or part else seed,
                valid=own.gather(1, columns), cond=cond,
                given=None if given is None else ~run.writable.gather(1, columns),
                **(settings if alone else settings | options),
            )  # fmt: skip
            yield from run.fill(states, columns)
        if stop is not None:
            run.end(number, stop)
    if run.filled_up:
        yield run.stopped()


def _check(
    space: TokenSpace, inner: Callable[..., Iterator[State]], options: dict[str, object], *,
    lengths: tuple[int, int], context: int | None, stop: int | None,
) -> None:  # fmt: skip
    block_length, sub_block_length = lengths
    if block_length < 1:
        raise ConfigError(f"block_length={block_length}: need at least 1")
    if sub_block_length < 1 or block_length % sub_block_length:
        raise ConfigError(
            f"sub_block_length={sub_block_length}: expected a divisor of {block_length}"
        )
    if context is not None and context < block_length:
        raise ConfigError(f"context={context}: need at least block_length={block_length}")
    if stop is not None and not 0 <= stop < space.vocab_size:
        raise ConfigError(f"stop={stop}: expected an id below {space.vocab_size}")
    if space.parts:
        raise ConfigError("blocks: a canvas of parts is sampled whole")
    process = options.get("process")
    if isinstance(process, Process) and not ends_in_masks(process):
        raise ConfigError(
            "blocks: later blocks are shown as masks, which this model's noise does not end in: "
            "its canvas is sampled whole"
        )
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
        self.kept: FinishedBlocks | None = None

    def numbers(self) -> range:
        """The blocks from the first in which any row has a position to write."""
        wanted = self.block[self.writable]
        first = int(wanted.min()) if wanted.numel() else 0
        return range(first, int(self.block.max()) + 1)

    def parts(self, number: int, length: int, *, seeded: bool) -> Iterator[Tensor]:
        """The positions (B, L) bool of a block that are filled together, one set after the other.

        They are `length` each; where blocks are `seeded`, the block's first is one before them.
        """
        own, end = self.block == number, min(self.length, self.canvas.shape[1])
        offset = own.cumsum(1) - 1
        if seeded:
            yield own & (offset == 0)
        for start in range(0, end, length):
            yield own & (offset // length == start // length)

    def columns(self, number: int) -> Tensor:
        """The positions of a block, (B, W) int64, those of other blocks behind its own."""
        width = min(self.length, self.canvas.shape[1])
        return (self.block != number).long().argsort(dim=1, stable=True)[:, :width]

    def window(
        self, denoiser: Denoiser, number: int, columns: Tensor, schedule: Schedule,
        context: int | None,
    ) -> BlockWindow | CachedBlock:  # fmt: skip
        """The denoiser of columns of a block, which is given `context` positions, None for all.

        With finished blocks `kept`, its calls run on the block alone.
        """
        attended = self.valid
        if context is not None:
            end = torch.where(self.block == number, self.rank, -1).amax(1, keepdim=True)
            attended = attended & (self.rank <= end) & (self.rank > end - context)
        window = BlockWindow(
            denoiser, self.canvas, columns, attended=attended, writable=self.writable,
            schedule=schedule, mask_id=self.mask_id,
        )  # fmt: skip
        if self.kept is None:
            return window
        start = number * self.length
        width = min(columns.shape[1], self.canvas.shape[1] - start)
        return CachedBlock(window, partial(self.kept.before, self.canvas, start), width)

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
            revealed, log_prob, entropy, margin, rewritten, hidden_again = map(
                spread, state.by_position()
            )
            yield State(
                self.canvas, state.t, self.states, self.calls, self.rounds, self.exact, revealed,
                log_prob, entropy, margin, rewritten, hidden_again, state.in_turn,
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
