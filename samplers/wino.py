"""WINO: write many, then hide what the others do not expect (Hong et al. 2025)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.ops import surest
from mdiff.sampling import ROUNDING, State, Unmasking, ask_left_out, shadowed
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def wino(
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
    threshold: float = 0.6,
    keep_threshold: float = 0.9,
    most: int = 20,
    share: float = 0.7,
    floor: int = 5,
) -> Iterator[State]:
    """States on `canvas` (B, L) of rounds that write widely and take back what does not hold.

    A round draws a token at every mask of a sample with m masks and writes those whose probability
    is above `threshold`: the best, at least one, at most min(max(`floor`, `share` m), `most`). If
    it writes two or more, it also hides earlier tokens whose probability given all others is below
    `keep_threshold`, the worst first, one fewer at most than the round before wrote. So a sample
    takes at most as many rounds as it has positions that are not given. On a finished canvas the
    first round only hides, all but one token at most.

    Probabilities of standing tokens come from shadows in the same call where the denoiser has
    them (`ShadowPositions`: exact with one layer), else from a canvas for each token, which
    counts as a call. Published at temperature 0, in blocks of 128.

    Raises ConfigError for thresholds outside [0, 1], a keep_threshold below the threshold but for
    0 (which takes nothing back), a share outside [0, 1], or not 1 <= floor <= most.
    """
    _check(threshold, keep_threshold, most=most, share=share, floor=floor)
    fill = Unmasking(
        shadowed(denoiser, space.mask_id), canvas, space=space, seed=seed, valid=valid, cond=cond,
        given=given, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    # What stands at first counts as written by one round.
    last = (fill.free & ~fill.hidden).sum(1)
    full = (last > 1) & ~fill.hidden.any(1)
    step = 0
    while bool((full | fill.hidden.any(1)).any()):
        hidden, t = fill.hidden, fill.time_left(schedule)
        revisable = (last > 1) & (full | hidden.any(1)) & (keep_threshold > 0)
        standing = fill.free & ~hidden & revisable[:, None]
        at = hidden | standing
        drawn, log_prob = ask_left_out(fill, at, step, t)
        is_hidden = hidden.flatten()[fill.positions]
        p, kept = drawn.log_prob[is_hidden].exp(), log_prob[~is_hidden].exp()
        above = torch.zeros_like(at).masked_scatter(hidden, p > threshold).sum(1)
        limit = (share * hidden.sum(1).double() + ROUNDING).long().clamp(min=floor).clamp(max=most)
        write = surest(hidden, p, count_B=above.clamp(min=1).minimum(limit))
        written = write.sum(1)
        below = torch.zeros_like(at).masked_scatter(standing, kept < keep_threshold).sum(1)
        hide = surest(standing, -kept, count_B=below.minimum(last - 1) * ((written > 1) | full))
        yield fill.revise(at, drawn, fill.time_left(schedule), write=write, hide=hide)
        last, full = written, torch.zeros_like(full)
        step += 1


def _check(threshold: float, keep_threshold: float, *, most: int, share: float, floor: int) -> None:
    for name, value in (
        ("threshold", threshold), ("keep_threshold", keep_threshold), ("share", share)
    ):  # fmt: skip
        if not 0 <= value <= 1:
            raise ConfigError(f"{name}={value}: expected 0 to 1")
    if 0 < keep_threshold < threshold:
        raise ConfigError(
            f"keep_threshold={keep_threshold}: expected at least threshold={threshold}, or 0, "
            "which takes nothing back"
        )
    if not 1 <= floor <= most:
        raise ConfigError(f"floor={floor}, most={most}: expected 1 <= floor <= most")
