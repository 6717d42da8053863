"""How many positions each sample reveals at each step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.schedule import Schedule

# The name of a rule, or the numbers themselves.
Counts = str | Tensor

# A float64 product of a count that is this little below a whole number counts as it.
ROUNDING = 1e-9
# A table of reveals has no more steps, but where a canvas has more positions.
MOST_STEPS = 1 << 16


def positions_of_step(left: Sequence[int], table: list[list[int]] | None, step: int) -> list[int]:
    """How many positions each sample reveals at a step, of those that are left.

    `table` is a list of counts (B, steps); None is one a call.

    >>> positions_of_step([3, 1], [[2, 1], [0, 5]], 1)
    [1, 1]
    """
    if table is None:
        return [min(1, n) for n in left]
    return [min(row[step], n) for row, n in zip(table, left)]


def reveal_counts(
    counts: Counts, hidden: Tensor, *, steps: int | None, schedule: Schedule
) -> Tensor | None:
    """How many positions each sample reveals at each step, (B, steps) int64; None is one a call.

    `hidden` (B,) is how many positions each sample has to reveal. counts="schedule" follows m(t)
    on an even grid of times, "even" spreads evenly with the remainder in front (LLaDA);
    int64 (steps,) or (B, steps) are taken as they are and must sum to `hidden`.

    Raises ConfigError for anything else, or steps < 1.
    """
    if isinstance(counts, Tensor):
        if counts.dim() not in (1, 2) or (counts.dim() == 2 and len(counts) != len(hidden)):
            raise ConfigError(
                f"counts {tuple(counts.shape)}: expected (steps,) or ({len(hidden)}, steps)"
            )
        table = counts.to(hidden.device).expand(len(hidden), counts.shape[-1])
        if counts.dtype != torch.int64 or bool((table < 0).any()):
            raise ConfigError("counts: expected int64 numbers of positions, none negative")
        if bool((table.sum(1) != hidden).any()):
            raise ConfigError(
                f"counts sum to {table.sum(1).tolist()}; the samples hide {hidden.tolist()}"
            )
        if steps not in (None, table.shape[1]):
            raise ConfigError(f"steps={steps}, but counts has {table.shape[1]} steps")
        return table
    if steps is None:
        return None
    steps = useful_steps(steps, hidden)
    if counts == "even":
        index = torch.arange(steps, device=hidden.device)
        return hidden[:, None] // steps + (index < (hidden % steps)[:, None]).long()
    if counts == "schedule":
        return schedule_counts(hidden, steps=steps, schedule=schedule)
    raise ConfigError(f"counts={counts!r}: expected 'schedule', 'even' or a tensor of int64")


def useful_steps(steps: int, hidden: Tensor) -> int:
    """The steps, at most MOST_STEPS or as many as a sample of `hidden` (B,) positions can use.

    So many reveal one position each whatever the schedule; more would be as many empty steps.
    Raises ConfigError for steps < 1.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: need at least 1")
    return min(steps, max(MOST_STEPS, int(hidden.max()) if len(hidden) else 0))


def schedule_counts(
    hidden: Tensor, *, steps: int, schedule: Schedule, of: Tensor | None = None
) -> Tensor:
    """How many positions each sample reveals at each step, (B, steps) int64, along a schedule.

    MaskGIT's table (Chang et al. 2022, section 3.2): after step i floor(n m(1 - i / steps))
    positions stay hidden, n each sample's `hidden` (B,). At least one is revealed a step while
    two are left, and at least one is left for the last step. `of` (B,) is another n, as in
    aMUSEd (Patil et al. 2024), which counts the whole canvas, given positions and all. A product
    that is a whole number up to rounding counts as that number; the official codes of both take
    m in float32, where m = 1/2 is rounded down: see `samplers.amused.CosineInFloat32`.

    Raises ConfigError for steps < 1.
    """
    steps = useful_steps(steps, hidden)
    left = hidden
    of = hidden if of is None else of
    table = torch.zeros(len(hidden), steps, dtype=torch.int64, device=hidden.device)
    # Every step reveals one at least: what is left by then is the last one's.
    most = int(hidden.max()) if len(hidden) else 0
    for step in [*range(1, min(steps, most + 1)), steps]:
        share = schedule.mask_prob((steps - step) / steps).double().to(hidden.device)
        wanted = (of * share + ROUNDING).floor().long()
        stay = torch.minimum(wanted, left - 1).clamp(min=1) if step < steps else 0 * left
        stay = torch.minimum(stay, left)
        table[:, step - 1] = left - stay
        left = stay
    return table
