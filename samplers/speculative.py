"""Speculative: the law of `any_order` in fewer rounds of calls (Guo & Ermon 2025, ASSD)."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser, Rows
from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.ops import Draw
from mdiff.sampling import State, Unmasking, turns_of
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace

ACCEPT = ("ratio", "coupled")


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
    accept: str = "ratio",
) -> Iterator[State]:
    """States on `canvas` (B, L), each with the next tokens of `any_order`: at least one.

    A round is one call on up to `drafts` + 1 canvases of a sample. Canvas j holds the first j
    drafts in the `order` of `any_order` and verifies draft j; the tokens are written up to the
    first draft that is refused. The canvas of that one holds what is now written before it, and
    its laws q (V,) at the positions behind are what the drafts of the next round are drawn from.

    accept="ratio" keeps a draft with probability min(1, p / q) and else draws from what p has
    above q, p being the law that verifies it (Leviathan et al. 2023). Both are the laws after
    temperature and filters, as drawn from, so that the tokens have the law of `any_order` at one
    position a call, whatever the temperature and the filters. `drafts` laws a sample are kept, in
    float64.

    accept="coupled" draws draft and verification by the counter that `any_order` uses at that
    position, and keeps a draft that is the draw: given equal logits the tokens and their
    log-probabilities are those of `any_order`. A draft of another law agrees less often than the
    ratio accepts it. Batches of another size may round logits differently. At temperature 0 both
    are this rule.

    A sample takes at most as many rounds as it hides positions; its calls count canvases.

    Raises ConfigError for drafts < 1, an unknown `accept`, or an order that `any_order` refuses.
    """
    if drafts < 1:
        raise ConfigError(f"drafts={drafts}: need at least 1")
    if accept not in ACCEPT:
        raise ConfigError(f"unknown accept {accept!r}; {nearest(accept, ACCEPT)}")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    turn, guess, drafts = turns_of(order, fill), fill.tokens, min(drafts, canvas.shape[1])
    test = _Rejection(fill) if accept == "ratio" and temperature > 0 else None
    while any(fill.left):
        # There are no drafts before the first call.
        shown = drafts if fill.states else 0
        state, guess = _round(fill, turn, guess, shown, drafts, schedule, test)
        yield state


def acceptance(p: Tensor, q: Tensor, draft: Tensor) -> Tensor:
    """The chance (N,) that a draft (N,) of law q (N, V) is kept: min(1, p / q)."""
    likely, proposed = (law.gather(1, draft[:, None])[:, 0] for law in (p, q))
    return (likely / proposed).clamp(max=1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The law (N, V), not normalised, of what is drawn where a draft of law q is refused."""
    return (p - q).clamp(min=0)


class _Rejection:
    """The drafts' laws, and the test of each draft against the law that verifies it."""

    def __init__(self, fill: Unmasking) -> None:
        self.fill, self.q = fill, fill.tokens.new_zeros(1, 1).double()
        # The row of `q` that a position's draft was drawn from, (B * L,).
        self.row = torch.zeros_like(fill.tokens).flatten()

    def proposed(self, rows: Rows, drawn: Draw) -> Draw:
        """New drafts at the positions of the last draw."""
        fill = self.fill
        self.q = self._law(rows)[0]
        number = torch.arange(len(self.q), device=self.row.device)
        self.row = self.row.index_copy(0, fill.positions, number)
        return drawn._replace(tokens=self._chosen(self.q, drawn.tokens, philox.ORDER))

    def verified(self, rows: Rows, drawn: Draw, guess: Tensor, is_draft: Tensor) -> Draw:
        """Each draft (N,) of `guess` (B, L) or what is drawn instead; where none is, a draw."""
        p, logits, rest = self._law(rows)
        at = self.fill.positions
        draft = torch.where(is_draft, guess.flatten()[at], 0)
        q = self.q.expand(-1, p.shape[1])[torch.where(is_draft, self.row[at], 0)]
        kept = self._happens(torch.where(is_draft, acceptance(p, q, draft), 0))
        law = torch.where((is_draft > kept)[:, None], residual(p, q), p)
        tokens = torch.where(kept, draft, self._chosen(law, drawn.tokens, philox.NOISE))
        log_prob = self.fill.draw.log_prob(logits, tokens, drawn, **rest)
        return drawn._replace(tokens=tokens, log_prob=log_prob)

    def _happens(self, chance: Tensor) -> Tensor:
        """Whether what has this chance (N,) does, never at 0 and always at 1."""
        return self._uniform(philox.REVEAL) < chance

    def _chosen(self, law: Tensor, otherwise: Tensor, purpose: int) -> Tensor:
        """An id (N,) of each law (N, V), which need not sum to 1; `otherwise` (N,) of no law.

        That is a row of NaN, or what rounding leaves above a law that is nearly the same.
        """
        mass = law.cumsum(1)
        target = self._uniform(purpose)[:, None] * mass[:, -1:]
        found = torch.searchsorted(mass, target, right=True)
        return torch.where(target < mass[:, -1:], found, otherwise[:, None])[:, 0]

    def _uniform(self, purpose: int) -> Tensor:
        return self.fill.uniform(purpose, self.fill.states).flatten()[self.fill.positions]

    def _law(self, rows: Rows) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """The law (N, V) that is drawn from, its logits, and what belongs to them."""
        fill, head = self.fill, rows.head or (lambda logits: logits)
        span = None if fill.spans is None else fill.spans[fill.positions % fill.tokens.shape[1]]
        other = None if rows.unconditional is None else head(rows.unconditional)
        rest = {"unconditional": other, "scale": rows.scale, "span": span}
        logits = head(rows.conditional)
        return fill.draw.drawn_law(logits, **rest), logits, rest


def _round(
    fill: Unmasking, turn: Tensor, guess: Tensor, shown: int, drafts: int, schedule: Schedule,
    test: _Rejection | None,
) -> tuple[State, Tensor]:  # fmt: skip
    """The state after one call, and the canvas (B, L) with its drafts for the next one.

    The call shows at most `shown` tokens of `guess` (B, L), at the next turns of each sample.
    """
    device, length = turn.device, turn.shape[1]
    deepest = [min(shown, left - 1) for left in fill.left]
    rows = [(row, lane) for row, deep in enumerate(deepest) for lane in range(deep + 1)]
    sample, lane = torch.tensor(rows, device=device).unbind(1)
    lane, deep = lane[:, None], torch.tensor(deepest, device=device)[:, None]
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
        schedule.time_at(share / fill.whole[sample]), number=sum(number),
    )  # fmt: skip
    inside = torch.nonzero_static(at.flatten(), size=sum(number))[:, 0]

    def draw(chosen: Tensor, count: int) -> tuple[Rows, Draw]:
        """The rows of `count` of the canvases' positions `chosen` (R, L), and their draws."""
        index = torch.nonzero_static(chosen.flatten()[inside], size=count)[:, 0]
        canvas, column = inside[index] // length, inside[index] % length
        fill.positions = sample[canvas] * length + column
        some = found.some(index)
        return some, fill.draw_for(some, turn.flatten()[fill.positions])

    some, verified = draw(own == lane, len(rows))
    positions = fill.positions
    if test is not None:
        verified = test.verified(some, verified, guess, (lane < deep[sample])[:, 0])
    made = guess.flatten().index_copy(0, positions, verified.tokens).view_as(guess)
    wrong = (coming >= 0) & (coming < deep) & (made != guess)
    last = torch.where(wrong, coming, deep).amin(1, keepdim=True)
    written = (coming >= 0) & (coming <= last)
    count = (last[:, 0] + 1).tolist()
    # The draws of positions that are written, in the positions' order.
    order = positions.argsort()
    kept = torch.nonzero_static(written.flatten()[positions[order]], size=sum(count))[:, 0]
    source = order[kept]
    state = fill.reveal(written, Draw(*(each[source] for each in verified)), t, number=count)
    if more := sum(min(drafts, left) for left in fill.left):
        some, ahead = draw((own > lane) & (lane == last[sample]), more)
        ahead = ahead if test is None else test.proposed(some, ahead)
        guess = guess.flatten().index_copy(0, fill.positions, ahead.tokens).view_as(guess)
    return replace(state, in_turn=True), guess
