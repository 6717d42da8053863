"""Edit: write above one threshold, rewrite above another (LLaDA2.1, joint threshold)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.ops import surest
from mdiff.sampling import State, Unmasking
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def edit(
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
    threshold: float = 0.7,
    edit_threshold: float = 0.5,
    least: int = 1,
    rounds_after: int = 16,
) -> Iterator[State]:
    """States on `canvas` (B, L) of calls that write and rewrite until nothing changes.

    Each call draws a token at every position that is not given. Hidden ones whose draw has a
    probability above `threshold` are written, or the best `least` where fewer have; at the same
    call written ones whose draw is another token of a probability above `edit_threshold` take it.
    A sample ends when it hides nothing and a call changes nothing, at most `rounds_after` calls
    after its last mask. LLaDA2.1 runs it at temperature=0 in blocks; a threshold of 1 or more
    writes `least` a call, an edit_threshold of 1 or more never edits. Made for models that were
    trained to correct what they see; others copy it.

    Raises ConfigError for thresholds below 0, least < 1 or rounds_after < 0.
    """
    for name, value in (("threshold", threshold), ("edit_threshold", edit_threshold)):
        if not value >= 0:
            raise ConfigError(f"{name}={value}: expected a probability, at least 0")
    if least < 1 or rounds_after < 0:
        raise ConfigError(f"least={least}, rounds_after={rounds_after}: expected >= 1 and >= 0")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    open_rows = fill.free.any(1)
    after = torch.zeros_like(fill.start)
    step = 0
    while bool(open_rows.any()):
        at, t, hidden = fill.free & open_rows[:, None], fill.time_left(schedule), fill.hidden
        drawn = fill.ask(at, step, t, number=at.sum(1).tolist())
        p = drawn.log_prob.exp()
        above = [torch.zeros_like(at).masked_scatter(at, p > each) for each in
                 (threshold, edit_threshold)]  # fmt: skip
        # Where enough are above the threshold the best are among them.
        best = surest(
            at & hidden, p[hidden.flatten().index_select(0, fill.positions)],
            count_B=torch.full_like(after, least),
        )  # fmt: skip
        written = best | (above[0] & hidden)
        edited = above[1] & ~hidden & (fill.tokens.masked_scatter(at, drawn.tokens) != fill.tokens)
        was_full = ~hidden.any(1)
        yield fill.revise(at, drawn, fill.time_left(schedule), write=written | edited)
        after = after + was_full
        full = ~fill.hidden.any(1)
        stable = was_full & ~edited.any(1)
        open_rows = open_rows & ~stable & ~(full & (after >= rounds_after))
        step += 1
