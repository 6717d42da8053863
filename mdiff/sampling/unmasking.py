"""The unmasking loop: a canvas on its way from hidden to revealed, as every sampler drives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from mdiff.denoiser import (
    Condition,
    Denoiser,
    HasRowCost,
    RowBound,
    Rows,
    evaluations,
    fixed_evaluations,
    row_request,
)
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.kernels.reveal_torch import written
from mdiff.ops import Draw, Filters, LawReader, Revealed, bind_draw, reveal
from mdiff.sampling.seeds import streams
from mdiff.sampling.state import State, free_positions
from mdiff.schedule import Schedule
from mdiff.tokens import TokenSpace, ranks


class _ActiveRows:
    """Rows of a batch that a call evaluates: the denoiser, valid positions and condition of them.

    `rows` are their numbers, and `index` the same as int64 (N,), None for the whole batch.
    """

    def __init__(
        self, rows: tuple[int, ...], index: Tensor | None, denoiser: Denoiser,
        valid: Tensor | None, cond: Condition | None,
    ) -> None:  # fmt: skip
        self.rows, self.index, self.denoiser = rows, index, denoiser
        self.valid, self.cond = valid, cond
        self.request = row_request(denoiser)

    def some(self, rows: tuple[int, ...], device: torch.device) -> _ActiveRows:
        """Some rows of the whole batch, by their numbers."""
        index = torch.tensor(rows, dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            index = index.pin_memory().to(device, non_blocking=True)
        index = index.to(device)
        cond = {name: value[index] for name, value in (self.cond or {}).items()}
        denoiser = self.denoiser
        if isinstance(denoiser, RowBound):
            denoiser = denoiser.for_rows(index)
        valid = None if self.valid is None else self.valid[index]
        return _ActiveRows(rows, index, denoiser, valid, cond or None)


class Unmasking:
    """One batch on its way from hidden to revealed.

    Every random number is a function of (seed, sample, the rank of the position among the valid
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
        given: Tensor | None = None,
        measure: str = "model",
        **filters: Unpack[Filters],
    ) -> None:
        """Check the arguments and copy the canvas (B, L); raises ConfigError or DataError.

        `given` (B, L) bool are the positions that are never changed, by default all that do not
        hold the mask id.
        """
        space.check(canvas, valid)
        rows, device = canvas.shape[0], canvas.device
        for name, value in (cond or {}).items():
            if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
                shape = tuple(value.shape) if isinstance(value, Tensor) else value
                raise ConfigError(f"cond[{name!r}] {shape}: expected a tensor of {rows} rows")
        self.denoiser, self.valid, self.mask_id = denoiser, valid, space.mask_id
        self.tokens = canvas.clone()
        self.free = free_positions(canvas, given, valid, mask_id=space.mask_id)
        self.hidden = self.free & (canvas == space.mask_id)
        self.start = self.hidden.sum(1)
        self.whole = self.free.sum(1).clamp(min=1)
        # Hidden positions of each sample, kept on the host so that no step has to ask the device.
        self.left: list[int] = self.start.tolist()
        self.rank = ranks(canvas, valid)
        self.seed, self.sample = streams(seed, rows, device)
        # The counter of each position's draw, (seed, sample, rank), row-major: (3, B * L) int64.
        own = (self.seed[:, None], self.sample[:, None], self.rank)
        self.counter = torch.stack([each.expand_as(self.rank) for each in own]).flatten(1)
        self.spans = space.spans(canvas.shape[1], device)
        self.calls = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rounds = self.calls
        self.draw = bind_draw(
            space.vocab_size, device=device.type, measure=measure, never=space.forbidden, **filters
        )
        # Until a reveal depends on what was drawn, or a token is taken back.
        self.log_prob_is_exact = self.draw.is_plain
        # The evaluations that a call costs each row; None where they depend on the canvas.
        varies = isinstance(denoiser, HasRowCost)
        self.cost = None if varies else fixed_evaluations(denoiser)
        self.blank = torch.zeros(canvas.shape, dtype=torch.float32, device=device)
        self.nothing = torch.zeros_like(self.hidden)
        # The flat indices of the last call's positions, in the order of its draws: (N,) of B * L.
        self.positions = torch.empty(0, dtype=torch.int64, device=device)
        self.everyone = _ActiveRows(tuple(range(rows)), None, denoiser, valid, dict(cond or {}))
        self.active = self.everyone
        self.states = 0

    def uniform(self, purpose: int, step: int = 0) -> Tensor:
        """One uniform a position, (B, L) float64."""
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
        """The time (B,) at which the share of positions now hidden would be expected."""
        return schedule.time_at(self.hidden.sum(1).double() / self.whole)

    def ask(
        self, at: Tensor, step: int, t: Tensor, *, number: Sequence[int], idle: bool = False,
        positions: Tensor | None = None, leave_out: bool = False,
    ) -> Draw:  # fmt: skip
        """Call the denoiser once and draw a token for each position `at` (B, L), row-major.

        `number` are the positions of each sample, so that there is no host-device
        synchronisation. Only samples with such a position are evaluated and counted; `idle`
        evaluates every sample that still hides something. `positions` (N,) are the flat indices
        of `at`, where they are known. `leave_out` shows the denoiser the mask at `at`, whatever
        stands there.
        """
        if positions is None:
            positions = torch.nonzero_static(at.flatten(), size=sum(number))[:, 0]
        self.positions = positions
        return self.draw_for(self._evaluate(at, t, number, idle=idle, leave_out=leave_out), step)

    def ask_beside(
        self, at: Tensor, step: int, t: Tensor, *, number: Sequence[int],
        read: LawReader | None = None,
    ) -> tuple[Draw, Tensor]:  # fmt: skip
        """The same, and (N,) what `read` makes of the laws, or log p of the ids standing there."""
        self.positions = torch.nonzero_static(at.flatten(), size=sum(number))[:, 0]
        rows = self._evaluate(at, t, number)
        standing, counter = self.tokens.flatten()[self.positions], self.counters(rows, step)
        return self.draw.of_features(
            rows.conditional, rows.head, standing=standing, read=read, **counter
        )

    def draw_for(self, rows: Rows, step: int | Tensor) -> Draw:
        """Draw for rows of `evaluate` at `self.positions`; `step` is one counter or (N,) int64."""
        counter = self.counters(rows, step)
        if rows.head is None:
            return self.draw(rows.conditional, **counter)
        return self.draw.of_features(rows.conditional, rows.head, read=None, **counter)[0]

    def counters(self, rows: Rows, step: int | Tensor) -> dict[str, Tensor | None]:
        """What a draw of the rows is given beside them: their counters and the other branch."""
        seed, sample, position = self.counter.index_select(1, self.positions).unbind()
        length = self.tokens.shape[1]
        return {
            "seed": seed, "sample": sample, "position": position,
            "step": step if isinstance(step, Tensor) else torch.full_like(seed, step),
            "span": None if self.spans is None else self.spans[self.positions % length],
            "unconditional": rows.unconditional, "scale": rows.scale,
        }  # fmt: skip

    def _evaluate(
        self, at: Tensor, t: Tensor, number: Sequence[int], *, idle: bool = False,
        leave_out: bool = False,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at` (B, L), of the samples that need them."""
        rows = tuple(r for r, n in enumerate(self.left if idle else number) if n)
        tokens = torch.where(at, self.mask_id, self.tokens) if leave_out else self.tokens
        if (index := self._active(rows).index) is not None:
            tokens, at, t = tokens[index], at[index], t[index]
        return self.evaluate(rows, tokens, at, t, number=sum(number))

    def evaluate(
        self, samples: tuple[int, ...], tokens: Tensor, at: Tensor, t: Tensor, *, number: int
    ) -> Rows:
        """Its rows at `number` positions `at` of canvases (R, L) of `samples`: R calls, a round."""
        active = self._active(samples)
        index, calls = active.index, self.calls
        rows = active.request(
            tokens, at=at, number=number, valid=active.valid, cond=active.cond,
            t=t.float() if self.denoiser.uses_time else None,
        )  # fmt: skip
        spent: int | Tensor | None = self.cost
        if spent is None:
            spent = evaluations(active.denoiser, tokens, valid=active.valid, cond=active.cond)
        if index is None:
            self.calls, self.rounds = calls + spent, self.rounds + 1
        else:
            more = torch.as_tensor(spent, device=calls.device).expand(len(index))
            self.calls = calls.index_add(0, index, more)
            self.rounds = self.rounds.index_copy(0, index, self.rounds[index] + 1)
        return rows

    def _active(self, rows: tuple[int, ...]) -> _ActiveRows:
        """These rows of the batch, bound again only when they change."""
        if rows == self.everyone.rows:
            return self.everyone
        if rows != self.active.rows:
            self.active = self.everyone.some(rows, self.tokens.device)
        return self.active

    def reveal(self, at: Tensor, drawn: Draw, t: Tensor, *, number: Sequence[int]) -> State:
        """Write the draws of the hidden positions `at`, `number` in each sample; the new state."""
        revealed = written(self.tokens, at, drawn, at, blank_BL=self.blank)
        return self._state(revealed, at, drawn, t, number)

    def reveal_surest(
        self, requested: Tensor, drawn: Draw, score: Tensor, t: Tensor, *, count: Tensor,
        number: Sequence[int], threshold: float | None = None,
    ) -> State:  # fmt: skip
        """Write, of the draws at `requested`, `count` (B,) of each sample with the highest score.

        `number` is the same count on the host, at most what is hidden. With a threshold all that
        reach it are written too, and their number is asked of the device.
        """
        self.log_prob_is_exact = False
        revealed = reveal(self.tokens, requested, drawn, score, count=count, threshold=threshold)
        if threshold is not None:
            number = revealed.at.sum(1).tolist()
        return self._state(revealed, requested, drawn, t, number)

    def revise(
        self, requested: Tensor, drawn: Draw | None, t: Tensor, *, write: Tensor,
        hide: Tensor | None = None, left: Sequence[int] | None = None,
    ) -> State:  # fmt: skip
        """Write those of the draws at `requested` that are in `write`, hide the tokens of `hide`.

        All (B, L) bool; `hide` are written tokens, not in `write`, and neither holds a given one.
        Without a draw nothing is written. `left` is what each sample hides afterwards; where it is
        not known it is asked of the device.
        """
        self.log_prob_is_exact = False
        if drawn is None:
            revealed = Revealed(self.tokens, self.nothing, self.blank, self.blank)
        else:
            revealed = written(self.tokens, requested, drawn, write, blank_BL=self.blank)
        rewritten = (write > self.hidden) & (revealed.tokens != self.tokens)
        if hide is not None:
            tokens = torch.where(hide, self.mask_id, revealed.tokens)
            revealed = revealed._replace(tokens=tokens)
        state = self._state(revealed, requested, drawn, t, (), rewritten, hide)
        self.hidden = self.hidden if hide is None else self.hidden | hide
        self.left = self.hidden.sum(1).tolist() if left is None else list(left)
        return state

    def _state(
        self, revealed: Revealed, requested: Tensor, drawn: Draw | None, t: Tensor,
        number: Sequence[int], rewritten: Tensor | None = None, hidden_again: Tensor | None = None,
    ) -> State:  # fmt: skip
        self.tokens = revealed.tokens
        # Hidden and not written now.
        self.hidden = self.hidden > revealed.at
        self.left = [left - n for left, n in zip(self.left, number)]
        self.states += 1
        margin = self.blank
        if drawn is not None:
            blank = self.blank.to(revealed.log_prob.dtype)
            margin = blank.masked_scatter(requested, drawn.margin)
        if requested is not revealed.at:
            margin = torch.where(revealed.at, margin, 0)
        return State(
            self.tokens, t, self.states, self.calls, self.rounds, self.log_prob_is_exact,
            revealed.at, revealed.log_prob, revealed.entropy, margin,
            self.nothing if rewritten is None else rewritten,
            self.nothing if hidden_again is None else hidden_again,
        )  # fmt: skip
