"""Path planning: keep the tokens that score best, written ones too (Peng et al. 2025, P2)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError, nearest
from mdiff.ops import surest
from mdiff.sampling import ROUNDING, State, Unmasking, check_steps
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace

SCORES = ("standing", "drawn")


def path_planning(
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
    steps: int = 32,
    score: str = "standing",
    kept: float = 0.0,
) -> Iterator[State]:
    """States of `steps` calls on `canvas` (B, L), each of which keeps a growing share of tokens.

    Each call draws a token at every position that is not given and scores it: a hidden one by the
    log-probability of its draw, a written one by that of the token that stands there, of which the
    denoiser is shown all. Of N positions the best ceil(k N) are kept, k from `kept` to 1 in even
    steps; kept masks take their draws, kept tokens stay, all others are hidden. score="drawn"
    scores written ones by their fresh draw too, as Open-dLLM's code does.

    A finished canvas is revised with `kept` near 1: the worst tokens are hidden first. The
    positions depend on the drawn tokens, so there is no exact law at any number of steps.

    Raises ConfigError for an unknown score, kept outside [0, 1), or steps out of range.
    """
    if score not in SCORES:
        raise ConfigError(f"unknown score {score!r}; {nearest(score, SCORES)}")
    if not 0 <= kept < 1:
        raise ConfigError(f"kept={kept}: expected at least 0 and less than 1")
    check_steps(steps)
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    count = fill.free.sum(1)
    number: list[int] = count.tolist()
    # How many positions of each sample are hidden after each step, (B, steps).
    remaining = torch.arange(steps, device=canvas.device).flip(0).double()
    share = (1 - kept) * remaining / steps
    hides = (count[:, None].double() * share + ROUNDING).floor().long()
    left = hides.tolist()
    for step in range(steps if any(number) else 0):
        t, hidden = fill.time_left(schedule), fill.hidden
        drawn, standing = fill.ask_beside(fill.free, step, t, number=number)
        value = drawn.log_prob
        if score == "standing":
            is_hidden = hidden.flatten().index_select(0, fill.positions)
            value = torch.where(is_hidden, value, standing.to(value.dtype))
        best = surest(fill.free, value, count_B=count - hides[:, step])
        yield fill.revise(
            fill.free, drawn, t, write=hidden & best, hide=fill.free & ~(hidden | best),
            left=[row[step] for row in left],
        )  # fmt: skip
