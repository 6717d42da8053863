"""Oblivious orders: each hidden position has its turn before the first call."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.sampling.counts import positions_of_step
from mdiff.sampling.state import State
from mdiff.sampling.unmasking import Unmasking
from mdiff.schedule import Schedule

ORDERS = ("left_to_right", "right_to_left", "random")


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


def turns_of(order: str | Tensor, fill: Unmasking) -> Tensor:
    """Each hidden position's turn (B, L) in an order that `samplers.any_order` takes.

    Raises ConfigError for an unknown name, or a tensor that is not a permutation.
    """
    if isinstance(order, Tensor):
        return turns(_inverse(order, fill.hidden), fill.hidden)
    if order == "left_to_right":
        return turns(fill.rank, fill.hidden)
    if order == "right_to_left":
        return turns(-fill.rank, fill.hidden)
    if order == "random":
        return turns(fill.uniform(philox.ORDER), fill.hidden)
    raise ConfigError(f"unknown order {order!r}; {nearest(order, ORDERS)}, or a permutation")


def _inverse(order: Tensor, hidden: Tensor) -> Tensor:
    """The turn of each position (B, L), from the positions in their order."""
    length = hidden.shape[1]
    positions = torch.arange(length, device=hidden.device)
    order = order.to(hidden.device)
    fits = order.dtype == torch.int64 and order.shape in ((length,), hidden.shape)
    if not fits or bool((order.sort(-1).values != positions).any()):
        raise ConfigError(
            f"order {tuple(order.shape)} {order.dtype}: expected a permutation of 0 to "
            f"{length - 1}, of shape ({length},) or {tuple(hidden.shape)}, int64"
        )
    return order.expand(hidden.shape).argsort(1)
