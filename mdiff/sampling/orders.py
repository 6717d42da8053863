"""Oblivious orders: each hidden position has its turn before the first call."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.sampling.counts import positions_of_step
from mdiff.sampling.state import State
from mdiff.sampling.unmasking import Unmasking
from mdiff.schedule import Schedule


def reveal_in_turn(
    fill: Unmasking, turn: Tensor, counts: Tensor | None, schedule: Schedule
) -> Iterator[State]:
    """States of an oblivious order: `turn` (B, L) is each hidden position's turn, from 0.

    `counts` (B, steps) int64 are the positions revealed a step; None is one a call.
    """
    done = torch.zeros_like(fill.start)
    table = None if counts is None else counts.tolist()
    step = 0
    while any(fill.left):
        number = positions_of_step(fill.left, table, step)
        if any(number):
            count = torch.ones_like(done) if counts is None else counts[:, step]
            at = fill.hidden & (turn >= done[:, None]) & (turn < (done + count)[:, None])
            done = done + count
            t = fill.time_left(schedule)
            yield fill.reveal(at, fill.ask(at, step, t, number=number), t, number=number)
        step += 1


def turns(order: Tensor, hidden: Tensor) -> Tensor:
    """Each hidden position's turn (B, L) among the hidden ones, by ascending `order` (B, L)."""
    last = order.max() + 1 if order.numel() else 0
    return torch.where(hidden, order, last).argsort(dim=1, stable=True).argsort(dim=1)
