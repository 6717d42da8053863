"""First hitting: jump from one reveal to the next (Zheng et al. 2024, algorithm 1)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.ops import surest
from mdiff.sampling import State, Unmasking
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def first_hitting(
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
    per_call: int = 1,
    corrector: int = 0,
) -> Iterator[State]:
    """States of the exact sampler: one call for each hidden token of a sample, and not more.

    With n positions of `canvas` (B, L) hidden at time t, the next reveal is at the time with
    m(next) = u^(1/n) m(t), the largest of n uniforms; the position is uniform among the hidden
    ones and the token is drawn from the denoiser at that time. Each sample has its own times.
    `per_call=k` reveals k positions at the k-th such time from one call: k times fewer calls,
    and then no longer the exact law (the k tokens are drawn independently).

    `corrector=c` is nearer to the joint than that, for one call more, ceil(n / k) + 1 at most: of
    the tokens that a call wrote, the c of the largest entropy (fewer than all) are hidden in the
    next one and drawn again with its new ones, those of the last call in one of their own.
    corrector=1 is best. A plain run of as many calls is about as near where it spends them well.

    Raises ConfigError for per_call < 1, corrector < 0 and for sampling options out of range.
    """
    if per_call < 1 or corrector < 0:
        raise ConfigError(f"per_call={per_call}, corrector={corrector}: need at least 1 and 0")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    most = int(fill.start.max())
    corrects = corrector > 0 and per_call > 1
    per_call = max(1, min(per_call, most))
    steps = -(-most // per_call)
    turn = _turns(fill.hidden, fill.row_uniforms(philox.ORDER, steps=steps, lanes=per_call))
    m = _hitting_shares(fill.start, fill.row_uniforms(philox.TIME, steps=steps, lanes=per_call))
    counts = [[max(0, min(per_call, n - s * per_call)) for n in fill.left] for s in range(steps)]
    if corrects:
        group = turn.div(per_call, rounding_mode="floor")
        yield from _corrected(fill, group, counts, schedule.time_at(m), corrector)
        return
    # The flat indices of each step, ascending: the order is known before the first call.
    group = torch.where(turn < 0, steps, turn.div(per_call, rounding_mode="floor")).flatten()
    inside = group.argsort(stable=True)[: sum(fill.left)]
    positions = torch.split(inside, [sum(n) for n in counts])
    for step, t in enumerate(schedule.time_at(m).unbind(1)):
        at = turn.div(per_call, rounding_mode="floor") == step if per_call > 1 else turn == step
        drawn = fill.ask(at, step, t, number=counts[step], positions=positions[step])
        yield fill.reveal(at, drawn, t, number=counts[step])


def _corrected(
    fill: Unmasking, group: Tensor, counts: list[list[int]], times: Tensor, corrector: int
) -> Iterator[State]:
    """States that draw the `corrector` least certain tokens of a call again in the next one.

    `group` (B, L) is the step of each position, `counts` [step][sample] how many that are.
    """
    nothing = [0] * len(group)
    again, redrawn = fill.nothing, nothing
    for step, new in enumerate([*counts, nothing]):
        number = [n + more for n, more in zip(new, redrawn)]
        if not any(number):
            return
        at, t = (group == step) | again, times[:, min(step, len(counts) - 1)]
        drawn = fill.ask(at, step, t, number=number, leave_out=True)
        redrawn = [min(corrector, n - 1) if writes else 0 for n, writes in zip(number, new)]
        most = torch.tensor(redrawn, device="cpu").to(group.device)
        again = surest(at, drawn.entropy, count_B=most)
        yield fill.revise(at, drawn, t, write=at)


def _turns(hidden: Tensor, uniforms: Tensor) -> Tensor:
    """When each position is revealed, (B, L) int64 from 0, -1 where it is not hidden.

    Each is uniform among the positions of `hidden` (B, L) that are left. `uniforms` (B, steps,
    per_call), one a reveal.
    """
    turn = torch.full(hidden.shape, -1, dtype=torch.int64, device="cpu")
    for row, (hides, draws) in enumerate(zip(hidden.tolist(), uniforms.flatten(1).tolist())):
        left = [position for position, is_hidden in enumerate(hides) if is_hidden]
        order = [left.pop(int(u * len(left))) for u in draws[: len(left)]]
        turn[row, order] = torch.arange(len(order), device="cpu")
    return turn.to(hidden.device)


def _hitting_shares(count: Tensor, uniforms: Tensor) -> Tensor:
    """The m at the last reveal of each step, (B, steps) float64.

    A product of u^(1/n) over the reveals so far, n the positions left before each. `count` (B,)
    positions are hidden at first; `uniforms` (B, steps, per_call), one a reveal.
    """
    reveal = torch.arange(uniforms[0].numel(), device=count.device).view(uniforms.shape[1:])
    left = (count[:, None, None] - reveal).double()
    share = torch.where(left > 0, uniforms ** (1 / left.clamp(min=1)), 1.0)
    return share.prod(2).cumprod(1)
