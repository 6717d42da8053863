"""Reveal the positions in a given order, which does not depend on the logits."""

from collections.abc import Iterator

from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.sampling import Counts, State, Unmasking, reveal_counts, reveal_in_turn, turns_of
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


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
    yield from reveal_in_turn(fill, turns_of(order, fill), table, schedule)
