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
    at, least_of = fill.free, torch.full_like(fill.start, least)
    every: list[int] = at.sum(1).tolist()
    # A finished sample has calls only where some are permitted after the last mask.
    number = [n if left or rounds_after else 0 for n, left in zip(every, fill.left)]
    after, step = [0] * len(number), 0
    while any(number):
        if number != every:
            is_open = torch.tensor([n > 0 for n in number], device="cpu").to(canvas.device)
            at = fill.free & is_open[:, None]
        t, hidden, left = fill.time_left(schedule), fill.hidden, fill.left
        drawn = fill.ask(at, step, t, number=number)
        p = drawn.log_prob.exp()
        table = torch.zeros_like(hidden, dtype=p.dtype).masked_scatter(at, p)
        # Where enough are above the threshold the best are among them.
        of_hidden = p.masked_fill((~hidden).flatten().index_select(0, fill.positions), -torch.inf)
        best = surest(at, of_hidden, count_B=least_of)
        written = hidden & at & (best | (table > threshold))
        differs = fill.tokens.masked_scatter(at, drawn.tokens) != fill.tokens
        edited = ~hidden & (table > edit_threshold) & differs
        new, changed = torch.stack([written.sum(1), edited.sum(1)]).tolist()
        rest = [n - w for n, w in zip(left, new)]
        yield fill.revise(at, drawn, t, write=written | edited, left=rest)
        after = [n + (hid == 0) for n, hid in zip(after, left)]
        ends = [
            n == 0 and ((hid == 0 and not changes) or calls >= rounds_after)
            for n, hid, changes, calls in zip(fill.left, left, changed, after)
        ]
        number = [0 if end else n for n, end in zip(number, ends)]
        step += 1
