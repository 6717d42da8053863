"""Halton: reveal the positions of a grid in a low-discrepancy order (Besnier et al. 2025)."""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.sampling import (
    Counts,
    State,
    Unmasking,
    reveal_counts,
    reveal_in_turn,
    turns,
    useful_steps,
)
from mdiff.schedule import Arccos, Schedule
from mdiff.tokens import TokenSpace

# The share revealed at progress r in [0, 1]; what stays hidden is the literature's gamma(r).
CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "root": lambda r: r**0.5,
    "linear": lambda r: r,
    "square": lambda r: r**2,
    "cosine": lambda r: 1 - torch.cos(r * math.pi * 0.5),
    "arccos": lambda r: 1 - torch.arccos(r) / (math.pi * 0.5),
}


def halton(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule = Arccos(),  # noqa: B008
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    given: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    steps: int | None = None,
    counts: Counts = "schedule",
    roll: bool = False,
) -> Iterator[State]:
    """States of an oblivious order that spreads over a grid: exact at one reveal a call.

    `grid` (h, w) says that the first h * w positions of `canvas` (B, L) are a grid, row by row;
    None is the most square h * w of each row's valid positions. They are revealed in the order in
    which the Halton sequence (base 2 down, base 3 across) first meets them, given ones skipped;
    positions beyond the grid follow in canvas order. `roll=True` starts each sample at a
    random point of the sequence, which then wraps around.

    `steps=None` is one position a call; otherwise `counts` over that many steps: a tensor, one of
    `sampling.reveal_counts`, or "root" or "square", the two curves of `curve_counts` that no
    schedule has, at the progress i / steps of step i = 1, 2, ...

    Raises ConfigError for a grid that does not fit, or counts that do not.
    """
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    if steps is not None and isinstance(counts, str) and counts in ("root", "square"):
        steps = useful_steps(steps, fill.start)
        counts = curve_counts(fill.start, steps=steps, curve=counts, begin=1 / steps)
    table = reveal_counts(counts, fill.start, steps=steps, schedule=schedule)
    turn = turns(_priority(fill, grid, roll), fill.hidden)
    yield from reveal_in_turn(fill, turn, table, schedule)


def halton_order(grid: tuple[int, int]) -> Tensor:
    """The cells of a grid (h, w) in their order of visit, (h * w,) int64: row * w + column.

    Point i = 1, 2, ... of the sequence lies in row floor(h r2(i)) and column floor(w r3(i)),
    r the radical inverses, in whole numbers; a cell is visited where it is first met. A row
    is at least as high as an interval of length 2^-p and a column as wide as one of 3^-q, if
    2^p >= 2 h and 3^q >= 2 w, so that any 2^p 3^q consecutive points meet every cell.

    >>> halton_order((2, 2)).tolist()
    [2, 1, 0, 3]
    """
    h, w = _checked(grid)
    return _order(h, w).clone()


def curve_counts(hidden: Tensor, *, steps: int, curve: str, begin: float = 0.0) -> Tensor:
    """How many positions each sample reveals at each step, (B, steps) int64, by a named curve.

    `hidden` (B,) are the positions that each sample has to reveal. `curve` is "root", "linear",
    "square", "cosine" or "arccos"; see `revealed_by`. By the end of step i at least i are
    revealed, as in the sampling loops of Halton-MaskGIT, and never more than there are.

    Raises ConfigError for steps < 1 or an unknown curve.

    >>> curve_counts(torch.tensor([16]), steps=4, curve="square", begin=1 / 4).tolist()
    [[1, 3, 5, 7]]
    """
    revealed = revealed_by(hidden, steps=steps, curve=curve, begin=begin)
    at_least = torch.arange(1, steps + 1, device=hidden.device)
    revealed = torch.minimum(revealed.maximum(at_least), hidden[:, None])
    # One step reveals everything, also where its only progress is `begin` = 0.
    revealed[:, -1] = hidden
    return revealed.diff(dim=1, prepend=torch.zeros_like(hidden)[:, None])


def revealed_by(hidden: Tensor, *, steps: int, curve: str, begin: float = 0.0) -> Tensor:
    """The positions that a curve wants revealed by each step, (B, steps) int64: floor(n f(r)).

    The progress r runs evenly from `begin` to 1: begin=0 is the confidence sampler of
    Halton-MaskGIT, begin=1 / steps its Halton sampler. In float32, as published: there a
    product that should be whole may fall just below.

    Raises ConfigError for steps < 1 or an unknown curve.
    """
    if steps < 1:
        raise ConfigError(f"steps={steps}: need at least 1")
    if curve not in CURVES:
        raise ConfigError(f"unknown curve {curve!r}; {nearest(curve, CURVES)}")
    progress = torch.linspace(begin, 1, steps, dtype=torch.float32, device=hidden.device)
    return (CURVES[curve](progress) * hidden[:, None]).long()


def _priority(fill: Unmasking, grid: tuple[int, int] | None, roll: bool) -> Tensor:
    """A number of each position, (B, L): the lowest is revealed first."""
    device = fill.hidden.device
    valid = torch.ones_like(fill.hidden) if fill.valid is None else fill.valid
    positions = valid.sum(1)
    shape = None if grid is None else _checked(grid)
    start = fill.row_uniforms(philox.ORDER, steps=1, lanes=1)[:, 0, 0] if roll else None
    when = fill.rank.clone()
    for size in sorted(set(positions[fill.start > 0].tolist())):
        h, w = shape or _most_square(size)
        if h * w > size:
            raise ConfigError(f"grid={(h, w)}: {h * w} cells, but the canvas has {size} positions")
        rows = positions == size
        turn = torch.arange(size, device=device)
        turn[: h * w] = _order(h, w).to(device).argsort()
        own = turn[fill.rank[rows]]
        if start is not None:
            first = (start[rows] * (h * w)).long()[:, None]
            own = torch.where(own < h * w, (own - first) % (h * w), own)
        when[rows] = own
    return when


def _checked(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid, or ConfigError where it is not two whole numbers of at least 1."""
    fits = isinstance(grid, tuple | list) and len(grid) == 2
    if not fits or any(type(side) is not int or side < 1 for side in grid):
        raise ConfigError(f"grid={grid!r}: expected (rows, columns), two whole numbers >= 1")
    return grid[0], grid[1]


def _most_square(positions: int) -> tuple[int, int]:
    """The (h, w) with h * w = positions and h <= w the nearest to each other."""
    h = next(h for h in range(math.isqrt(positions), 0, -1) if positions % h == 0)
    return h, positions // h


@lru_cache(maxsize=64)
def _order(h: int, w: int) -> Tensor:
    points = _power(2, 2 * h) * _power(3, 2 * w)
    index = torch.arange(1, points + 1, device="cpu")
    cell = _radical_cell(index, 2, h) * w + _radical_cell(index, 3, w)
    met = torch.full((h * w,), points + 1, device="cpu").scatter_reduce(0, cell, index, "amin")
    return met.argsort()


def _radical_cell(index: Tensor, base: int, cells: int) -> Tensor:
    """floor(cells * r(i)), r(i) the radical inverse of i: its digits behind the point, mirrored."""
    mirrored, scale = torch.zeros_like(index), 1
    while scale <= int(index[-1]):
        mirrored = mirrored * base + index // scale % base
        scale *= base
    return mirrored * cells // scale


def _power(base: int, least: int) -> int:
    """The smallest power of `base` that is at least `least`."""
    power = 1
    while power < least:
        power *= base
    return power
