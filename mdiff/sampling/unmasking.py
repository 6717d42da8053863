"""A canvas being filled in: the state and the moves that every sampler shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.denoiser import (
    Condition,
    Denoiser,
    HasRowCost,
    RowBound,
    evaluations,
    fixed_evaluations,
    row_request,
)
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.kernels.reveal_torch import written
from mdiff.ops import Draw, Revealed, bind_draw, reveal
from mdiff.sampling.seeds import streams
from mdiff.schedule import Schedule
from mdiff.tokens import TokenSpace, ranks

Counts = str | Tensor

# How far below a whole number a float64 product of a count may fall and still mean it.
ROUNDING = 1e-9


@dataclass(frozen=True)
class State:
    """What a sampler yields after each step of the batch.

    `tokens` (B, L) int64; `t` (B,) float64, each sample's time; `step`, the number of states
    so far; `calls` (B,) int64, the model evaluations each sample needed so far; `revealed`
    (B, L) bool, drawn in this step; `log_prob` and `entropy` (B, L) nats of those draws, 0
    elsewhere.
    """

    tokens: Tensor
    t: Tensor
    step: int
    calls: Tensor
    revealed: Tensor
    log_prob: Tensor
    entropy: Tensor


class _Bound:
    """Some rows of a batch with the denoiser, what is valid and the condition of these rows.

    `index` are their numbers (N,) int64, None for all of the batch.
    """

    def __init__(
        self, rows: tuple[int, ...], index: Tensor | None, denoiser: Denoiser,
        valid: Tensor | None, cond: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self.rows, self.index, self.denoiser = rows, index, denoiser
        self.valid, self.cond = valid, cond
        self.request = row_request(denoiser)

    def some(self, rows: tuple[int, ...], device: torch.device) -> _Bound:
        """The same for the rows with these numbers."""
        index = torch.tensor(rows, dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            index = index.pin_memory().to(device, non_blocking=True)
        index = index.to(device)
        inner = self.denoiser
        return _Bound(
            rows, index, inner.for_rows(index) if isinstance(inner, RowBound) else inner,
            None if self.valid is None else self.valid[index],
            {name: value[index] for name, value in self.cond.items()},
        )  # fmt: skip


class Unmasking:
    """One batch on its way from hidden to revealed.

    Every random number is a function of (seed, sample, the rank of the place among the valid
    tokens of its row, the sample's own step): not of the batch, the padding or the device.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        canvas: Tensor,
        *,
        space: TokenSpace,
        seed: int | Tensor,
        valid: Tensor | None,
        cond: Condition | None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        measure: str = "model",
    ) -> None:
        """Check the border and copy the canvas (B, L); raises ConfigError or DataError."""
        space.check(canvas, valid)
        rows, device = canvas.shape[0], canvas.device
        self.denoiser, self.space, self.valid = denoiser, space, valid
        self.cond = dict(cond or {})
        for name, value in self.cond.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ConfigError(f"cond[{name!r}] {shape}: expected a tensor of {rows} rows")
        self.tokens = canvas.clone()
        self.hidden = canvas == space.mask_id
        if valid is not None:
            self.hidden &= valid
        self.start = self.hidden.sum(1)
        # How many places each sample still hides, known here without asking the device again.
        self.left: list[int] = self.start.tolist()
        self.rank = ranks(canvas, valid)
        self.seed, self.sample = streams(seed, rows, device)
        # What names the draw of a place, (seed, sample, rank), row-major: (3, B * L) int64.
        self.counter = torch.stack(
            [
                self.seed[:, None].expand_as(self.rank),
                self.sample[:, None].expand_as(self.rank),
                self.rank,
            ]
        ).flatten(1)
        self.spans = space.spans(canvas.shape[1], device)
        self.calls = torch.zeros(rows, dtype=torch.int64, device=device)
        self.draw = bind_draw(
            space.vocab_size, device=device.type, temperature=temperature, top_k=top_k,
            top_p=top_p, min_p=min_p, measure=measure, never=space.forbidden,
        )  # fmt: skip
        # What every call costs a row; None where that depends on the canvas.
        varies = isinstance(denoiser, HasRowCost)
        self.cost = None if varies else fixed_evaluations(denoiser)
        self.blank = torch.zeros(canvas.shape, dtype=torch.float32, device=device)
        # The places of the last call, in the order of its draws: (N,) of B * L.
        self.place = torch.empty(0, dtype=torch.int64, device=device)
        self.everyone = _Bound(tuple(range(rows)), None, denoiser, valid, self.cond)
        self.active = self.everyone
        self.states = 0

    def uniform(self, purpose: int, step: int = 0) -> Tensor:
        """One uniform a place, (B, L) float64."""
        return philox.uniform(
            self.seed[:, None], self.rank, self.sample[:, None], step, purpose=purpose
        )

    def row_uniforms(self, purpose: int, *, steps: int, lanes: int) -> Tensor:
        """A sample's uniforms for steps 0, 1, ..., (B, steps, lanes) float64."""
        device = self.seed.device
        return philox.uniform(
            self.seed[:, None, None], 0, self.sample[:, None, None],
            torch.arange(steps, device=device)[:, None],
            purpose=purpose, tile=torch.arange(lanes, device=device),
        )  # fmt: skip

    def time_left(self, schedule: Schedule) -> Tensor:
        """The time (B,) at which the share of places now hidden would be expected."""
        return schedule.time_at(self.hidden.sum(1).double() / self.start.clamp(min=1))

    def ask(
        self, at: Tensor, step: int, t: Tensor, *, number: Sequence[int], idle: bool = False,
        place: Tensor | None = None,
    ) -> Draw:  # fmt: skip
        """Call the denoiser once and draw a token for each place `at` (B, L), row-major.

        `number` are the places of each sample, so that nothing waits for the device. Only
        samples with such a place are evaluated and counted; `idle` evaluates every sample
        that still hides something, as samplers do that do not look first. `place` (N,) are the
        numbers of the places among all B * L, where they are known.
        """
        if place is None:
            place = torch.nonzero_static(at.flatten(), size=sum(number))[:, 0]
        self.place = place
        seed, sample, position = self.counter.index_select(1, self.place).unbind()
        active = self._bound(tuple(row for row, n in enumerate(self.left if idle else number) if n))
        tokens, requested, index = self.tokens, at, active.index
        if index is not None:
            tokens, requested, t = tokens[index], at[index], t[index]
        rows = active.request(
            tokens, at=requested, number=sum(number), valid=active.valid,
            t=t.float() if self.denoiser.uses_time else None, cond=active.cond or None,
        )  # fmt: skip
        spent: int | Tensor | None = self.cost
        if spent is None:
            spent = evaluations(
                active.denoiser, tokens, valid=active.valid, cond=active.cond or None
            )
        if index is None:
            self.calls = self.calls + spent
        else:
            more = torch.as_tensor(spent, device=self.calls.device).expand(len(index))
            self.calls = self.calls.index_add(0, index, more)
        row = {
            "seed": seed, "sample": sample, "position": position,
            "step": torch.full_like(seed, step),
            "span": None if self.spans is None else self.spans[self.place % at.shape[1]],
            "unconditional": rows.unconditional, "scale": rows.scale,
        }  # fmt: skip
        if rows.head is None:
            return self.draw(rows.conditional, **row)
        return self.draw.of_features(rows.conditional, rows.head, **row)

    def _bound(self, rows: tuple[int, ...]) -> _Bound:
        """The denoiser bound to these rows, kept until they change."""
        if len(rows) == len(self.tokens):
            return self.everyone
        if rows != self.active.rows:
            self.active = self.everyone.some(rows, self.tokens.device)
        return self.active

    def reveal(self, at: Tensor, drawn: Draw, t: Tensor, *, number: Sequence[int]) -> State:
        """Write the draws of the places `at`, `number` in each sample; the new state."""
        revealed = written(self.tokens, at, drawn, at, blank_BL=self.blank)
        return self._state(revealed, t, number)

    def reveal_surest(
        self, asked: Tensor, drawn: Draw, score: Tensor, t: Tensor, *, count: Tensor,
        number: Sequence[int], threshold: float | None = None,
    ) -> State:  # fmt: skip
        """Write, of the draws at `asked`, `count` (B,) of each sample with the highest score.

        `number` is the same count on this side of the device, at most what is hidden. With a
        threshold the places that reach it are written too: how many is then asked back.
        """
        revealed = reveal(self.tokens, asked, drawn, score, count=count, threshold=threshold)
        if threshold is not None:
            number = revealed.at.sum(1).tolist()
        return self._state(revealed, t, number)

    def _state(self, revealed: Revealed, t: Tensor, number: Sequence[int]) -> State:
        self.tokens = revealed.tokens
        # Hidden and not written now.
        self.hidden = self.hidden > revealed.at
        self.left = [left - n for left, n in zip(self.left, number)]
        self.states += 1
        return State(
            self.tokens, t, self.states, self.calls, revealed.at, revealed.log_prob,
            revealed.entropy,
        )  # fmt: skip


def reveal_in_turn(
    fill: Unmasking, turn: Tensor, counts: Tensor | None, schedule: Schedule
) -> Iterator[State]:
    """States of an oblivious order: `turn` (B, L) is each hidden place's turn, from 0.

    `counts` (B, steps) int64 are the places revealed a step; None is one a call.
    """
    done = torch.zeros_like(fill.start)
    table = None if counts is None else counts.tolist()
    step = 0
    while any(fill.left):
        count = torch.ones_like(done) if counts is None else counts[:, step]
        number = positions_of_step(fill.left, table, step)
        at = fill.hidden & (turn >= done[:, None]) & (turn < (done + count)[:, None])
        done = done + count
        if any(number):
            t = fill.time_left(schedule)
            yield fill.reveal(at, fill.ask(at, step, t, number=number), t, number=number)
        step += 1


def positions_of_step(left: Sequence[int], table: list[list[int]] | None, step: int) -> list[int]:
    """How many places each sample reveals at a step, of those that are left.

    `table` is a list of counts (B, steps); None is one a call.

    >>> positions_of_step([3, 1], [[2, 1], [0, 5]], 1)
    [1, 1]
    """
    if table is None:
        return [min(1, n) for n in left]
    return [min(row[step], n) for row, n in zip(table, left)]


def turns(order: Tensor, hidden: Tensor) -> Tensor:
    """Each hidden place's turn (B, L) among the hidden ones, by ascending `order` (B, L)."""
    last = order.max() + 1 if order.numel() else 0
    return torch.where(hidden, order, last).argsort(dim=1, stable=True).argsort(dim=1)


def reveal_counts(
    counts: Counts, hidden: Tensor, *, steps: int | None, schedule: Schedule
) -> Tensor | None:
    """How many places each sample reveals at each step, (B, steps) int64; None is one a call.

    `hidden` (B,) is how many places each sample has to reveal. counts="schedule" follows m(t)
    on an even grid of times, "even" spreads evenly with the remainder in front (LLaDA);
    int64 (steps,) or (B, steps) are taken as given and must sum to `hidden`.

    Raises ConfigError for anything else, or steps < 1.
    """
    if isinstance(counts, Tensor):
        if counts.dim() not in (1, 2) or (counts.dim() == 2 and len(counts) != len(hidden)):
            raise ConfigError(
                f"counts {tuple(counts.shape)}: expected (steps,) or ({len(hidden)}, steps)"
            )
        table = counts.to(hidden.device).expand(len(hidden), counts.shape[-1])
        if counts.dtype != torch.int64 or bool((table < 0).any()):
            raise ConfigError("counts: expected int64 numbers of places, none negative")
        if bool((table.sum(1) != hidden).any()):
            raise ConfigError(
                f"counts sum to {table.sum(1).tolist()}; the samples hide {hidden.tolist()} places"
            )
        if steps not in (None, table.shape[1]):
            raise ConfigError(f"steps={steps}, but counts has {table.shape[1]} steps")
        return table
    if steps is None:
        return None
    if steps < 1:
        raise ConfigError(f"steps={steps}: need at least 1")
    if counts == "even":
        index = torch.arange(steps, device=hidden.device)
        return hidden[:, None] // steps + (index < (hidden % steps)[:, None]).long()
    if counts == "schedule":
        return schedule_counts(hidden, steps=steps, schedule=schedule)
    raise ConfigError(f"counts={counts!r}: expected 'schedule', 'even' or a tensor of int64")


def schedule_counts(
    hidden: Tensor, *, steps: int, schedule: Schedule, of: Tensor | None = None
) -> Tensor:
    """How many places each sample reveals at each step, (B, steps) int64, along a schedule.

    MaskGIT's table (Chang et al. 2022, section 3.2): after step i floor(n m(1 - i / steps))
    places stay hidden, n each sample's `hidden` (B,). At least one is revealed a step while
    two are left, and at least one is left for the last step. `of` (B,) is another n, as in
    aMUSEd (Patil et al. 2024), which counts the whole canvas, given places and all. A product
    that is a whole number up to rounding counts as that number.

    Raises ConfigError for steps < 1.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: need at least 1")
    left = hidden
    of = hidden if of is None else of
    table = []
    for step in range(1, steps + 1):
        share = schedule.mask_prob((steps - step) / steps).double().to(hidden.device)
        wanted = (of * share + ROUNDING).floor().long()
        stay = torch.minimum(wanted, left - 1).clamp(min=1) if step < steps else 0 * left
        stay = torch.minimum(stay, left)
        table.append(left - stay)
        left = stay
    return torch.stack(table, 1)
