"""Reveal the positions in a given order, which does not depend on the logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.sampling import Counts, State, Unmasking, reveal_counts, reveal_in_turn, turns
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace

ORDERS = ("left_to_right", "right_to_left", "random")


def any_order(
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
    order: str | Tensor = "left_to_right",
    steps: int | None = None,
    counts: Counts = "even",
) -> Iterator[State]:
    """States of an oblivious order on `canvas` (B, L): exact at one reveal a call.

    `order` is "left_to_right", "right_to_left", "random" (uniform, each sample its own), or a
    permutation of the L positions, (L,) or (B, L) int64, the first to reveal in front; given
    positions are skipped. `steps=None` is one position a call; otherwise `counts` over that many
    steps (see `sampling.reveal_counts`).

    Raises ConfigError for an order that is not a permutation, or counts that do not fit.
    """
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    table = reveal_counts(counts, fill.start, steps=steps, schedule=schedule)
    turn = turns(_priority(order, fill), fill.hidden)
    yield from reveal_in_turn(fill, turn, table, schedule)


def _priority(order: str | Tensor, fill: Unmasking) -> Tensor:
    """A number of each position, (B, L): the lowest is revealed first."""
    if isinstance(order, Tensor):
        return _inverse(order, fill.hidden)
    if order == "left_to_right":
        return fill.rank
    if order == "right_to_left":
        return fill.rank.max() - fill.rank
    if order == "random":
        return fill.uniform(philox.ORDER)
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
