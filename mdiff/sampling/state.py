"""What a sampler may write, what it yields after each step, and each position's last writing."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.errors import DataError


@dataclass(frozen=True)
class State:
    """What a sampler yields after each step of the batch.

    `tokens` (B, L) int64; `t` (B,) float64, each sample's time; `step`, the number of states
    so far; `calls` (B,) int64, the model evaluations each sample needed so far, and `rounds` (B,)
    int64, the calls one after another that it waited for; `revealed` (B, L) bool, written in this
    step; `log_prob`, `entropy` and `margin` (B, L) of those draws, 0 elsewhere.

    Where a sampler takes tokens back, `rewritten` (B, L) bool is where a written token held
    another one before, `hidden_again` where it holds the mask now. `log_prob_is_exact` is
    whether the log-probabilities so far sum to that of the tokens given the order of the reveals.
    `in_turn` is whether each token of the step was drawn given those before it in the order, not
    all from the same canvas: then no nats are spent.
    """

    tokens: Tensor
    t: Tensor
    step: int
    calls: Tensor
    rounds: Tensor
    log_prob_is_exact: bool
    revealed: Tensor
    log_prob: Tensor
    entropy: Tensor
    margin: Tensor
    rewritten: Tensor
    hidden_again: Tensor
    in_turn: bool = False

    def by_position(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields (B, L) that say what the step did, from `revealed` on."""
        return (
            self.revealed, self.log_prob, self.entropy, self.margin, self.rewritten,
            self.hidden_again,
        )  # fmt: skip


class Writing(NamedTuple):
    """The last writing of each token of one sample, as in `LastWriting`; one entry a token."""

    step: tuple[int, ...] = ()
    log_prob: tuple[float, ...] = ()
    entropy: tuple[float, ...] = ()
    margin: tuple[float, ...] = ()
    times: tuple[int, ...] = ()


class LastWriting:
    """What is known of the last writing of each position; each (B, L).

    `log_prob`, `entropy`, `margin` of its draw and 0 where there was none, `step` int64 which of
    the steps that changed its sample wrote it (0: none did), `times` int64 how often it was
    written. None of them depends on the other samples of the batch.
    """

    def __init__(self, canvas: Tensor) -> None:
        self.log_prob = self.entropy = self.margin = torch.zeros(
            canvas.shape, dtype=torch.float32, device=canvas.device
        )
        self.step = self.times = torch.zeros_like(canvas)
        self.own_steps = torch.zeros_like(canvas[:, :1])

    def add(self, state: State) -> None:
        """One more state."""
        at = state.revealed
        self.own_steps = self.own_steps + (at | state.hidden_again).any(1, keepdim=True)
        self.log_prob = torch.where(at, state.log_prob, self.log_prob)
        self.entropy = torch.where(at, state.entropy, self.entropy)
        self.margin = torch.where(at, state.margin, self.margin)
        self.step = torch.where(at, self.own_steps, self.step)
        self.times = self.times + at

    def of_row(self, row: int, valid: Tensor | None = None, count: int | None = None) -> Writing:
        """That of sample `row`, at the first `count` positions `valid` (B, L) bool alone."""
        kept = slice(None) if valid is None else valid[row]
        fields = self.step, self.log_prob, self.entropy, self.margin, self.times
        return Writing(*(tuple(field[row][kept][:count].tolist()) for field in fields))


def free_positions(
    canvas: Tensor, given: Tensor | None, valid: Tensor | None, *, mask_id: int
) -> Tensor:
    """The positions (B, L) bool of a canvas that a sampler may write: valid and not `given`.

    Raises DataError where `given` is not (B, L) bool, or is true at a valid mask.
    """
    hidden = canvas == mask_id
    if given is None:
        return hidden if valid is None else hidden & valid
    if not isinstance(given, Tensor) or given.shape != canvas.shape or given.dtype != torch.bool:
        got = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, Tensor) else repr(given)
        raise DataError(f"given {got}: expected {tuple(canvas.shape)} bool")
    free = ~given.to(canvas.device)
    if valid is not None:
        free, hidden = free & valid, hidden & valid
    if bool((hidden & ~free).any()):
        row, position = (int(i) for i in (hidden & ~free).nonzero()[0])
        raise DataError(
            f"row {row}, position {position} holds the mask but is given: it would stay hidden"
        )
    return free
