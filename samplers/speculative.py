"""Speculative: the tokens of `any_order` in fewer rounds of calls (Guo & Ermon 2025, ASSD)."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.ops import Draw
from mdiff.sampling import State, Unmasking, turns_of
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def speculative(
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
    drafts: int = 4,
) -> Iterator[State]:
    """States on `canvas` (B, L), each with the next tokens of `any_order`: at least one.

    A round is one call on up to `drafts` + 1 canvases of a sample. Canvas j holds the first j
    drafts in the `order` of `any_order` and draws the token of the next position; the draws are
    written up to the first one that is not the draft there. The canvas of that draw holds what is
    now written before it, and draws the drafts of the next round.

    Every draw is a function of its logits and of the counter that `any_order` uses at that
    position, so that given equal logits the tokens and their log-probabilities are those of
    `any_order` at one position a call, whatever the temperature and the filters; batches of
    another size may round logits differently. A draw inverts a cumulative law: a draft of another
    law agrees less often than the rejection test of the paper would accept it.

    A sample takes at most as many rounds as it hides positions; its calls count canvases.

    Raises ConfigError for drafts < 1, and for an order that `any_order` refuses.
    """
    if drafts < 1:
        raise ConfigError(f"drafts={drafts}: need at least 1")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    turn, guess = turns_of(order, fill), fill.tokens
    while any(fill.left):
        # There are no drafts before the first call.
        state, guess = _round(fill, turn, guess, drafts if fill.states else 0, drafts, schedule)
        yield state


def _round(
    fill: Unmasking, turn: Tensor, guess: Tensor, shown: int, drafts: int, schedule: Schedule
) -> tuple[State, Tensor]:
    """The state after one call, and the canvas (B, L) with its drafts for the next one.

    The call shows at most `shown` tokens of `guess` (B, L), at the next turns of each sample.
    """
    device, length = turn.device, turn.shape[1]
    deepest = [min(shown, left - 1) for left in fill.left]
    rows = [(row, lane) for row, deep in enumerate(deepest) for lane in range(deep + 1)]
    sample, lane = torch.tensor(rows, device=device).unbind(1)
    lane = lane[:, None]
    left = fill.hidden.sum(1, keepdim=True)
    # The turn of each hidden position counted from now on, of the samples and of their canvases.
    coming = torch.where(fill.hidden, turn - (fill.start[:, None] - left), -1)
    own = coming[sample]
    at = (own >= lane) & (own <= lane + drafts)
    number = [min(drafts + 1, fill.left[row] - deep) for row, deep in rows]
    t, share = fill.time_left(schedule), (left[sample] - lane)[:, 0].double()
    found = fill.evaluate(
        tuple(row for row, _ in rows),
        torch.where((own >= 0) & (own < lane), guess[sample], fill.tokens[sample]), at,
        schedule.time_at(share / fill.free.sum(1)[sample]), number=sum(number),
    )  # fmt: skip
    inside = torch.nonzero_static(at.flatten(), size=sum(number))[:, 0]

    def draw(chosen: Tensor, count: int) -> tuple[Draw, Tensor]:
        """Draws for `count` of the canvases' positions `chosen` (R, L), and where they belong."""
        index = torch.nonzero_static(chosen.flatten()[inside], size=count)[:, 0]
        canvas, column = inside[index] // length, inside[index] % length
        fill.positions = sample[canvas] * length + column
        return fill.draw_for(found.some(index), turn.flatten()[fill.positions]), fill.positions

    verified, positions = draw(own == lane, len(rows))
    made = guess.flatten().index_copy(0, positions, verified.tokens).view_as(guess)
    deep = torch.tensor(deepest, device=device)[:, None]
    wrong = (coming >= 0) & (coming < deep) & (made != guess)
    last = torch.where(wrong, coming, deep).amin(1, keepdim=True)
    written = (coming >= 0) & (coming <= last)
    count = (last[:, 0] + 1).tolist()
    # The draws of positions that are written, in the positions' order.
    source = (
        torch.empty_like(turn)
        .flatten()
        .index_copy(0, positions, torch.arange(len(rows), device=device))
    )
    source = source[torch.nonzero_static(written.flatten(), size=sum(count))[:, 0]]
    state = fill.reveal(written, Draw(*(each[source] for each in verified)), t, number=count)
    if more := sum(min(drafts, left) for left in fill.left):
        ahead, positions = draw((own > lane) & (lane == last[sample]), more)
        guess = guess.flatten().index_copy(0, positions, ahead.tokens).view_as(guess)
    return replace(state, in_turn=True), guess
