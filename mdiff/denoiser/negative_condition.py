"""Guidance away from another beginning: the unconditional branch sees other tokens in front."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser.guidance import Guided, guided
from mdiff.denoiser.protocol import Cache, Condition, Denoiser, Rows, evaluations, row_request
from mdiff.errors import ConfigError
from mdiff.tokens import TokenSpace

# The entries of `cond` by which a row's branch is told: whether it is the other one (B,) bool,
# what then stands in front (B, N) int64, and in place of which tokens (B, L) bool.
OTHER, START, REPLACED = "other_start.other", "other_start.tokens", "other_start.replaced"


def away_from(
    denoiser: Denoiser, *, space: TokenSpace, device: torch.device | str = "cpu", **guidance: Any
) -> Guided:
    """`guided`, with `guidance` as its options, away from canvases of another start.

    The calls, with tensors on `device`, are told `other_start(canvas, start)` in their `cond`.
    """
    without = {OTHER: torch.tensor(True, device=device)}
    return guided(OtherStart(denoiser), without=without, space=space, **guidance)


def other_start(
    canvas: Tensor, start: Tensor, *, valid: Tensor | None, space: TokenSpace
) -> dict[str, Tensor]:
    """What a canvas (B, L) is told so that its other branch begins with `start` (N,) int64.

    It takes the place of all that is given before the row's first hidden place.
    """
    hidden = canvas == space.mask_id
    if valid is not None:
        hidden &= valid
    return {
        OTHER: torch.zeros(len(canvas), dtype=torch.bool, device=canvas.device),
        START: start.to(canvas.device).expand(len(canvas), -1),
        REPLACED: hidden.cumsum(1) == 0,
    }


class OtherStart:
    """A Denoiser that, in the rows so marked, has other tokens in front than the canvas.

    The places asked for lie behind what is replaced.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.uses_time = denoiser.uses_time

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
    ) -> int | Tensor:
        """What the call costs each row: one evaluation of what is inside."""
        return evaluations(self.denoiser, tokens, valid=valid, cond=_rest(cond))

    def __call__(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (N, V) of the places `at`; else (B, L, V), 0 at padding and what is replaced."""
        told = dict(cond or {})
        if documents is not None or cache is not None:
            raise ConfigError("another start: it is for whole canvases, one a row, and no cache")
        if at is None:
            asked = ~(told[REPLACED] & told[OTHER][:, None])
            asked = asked if valid is None else asked & valid
            rows = self(tokens, at=asked, valid=valid, t=t, cond=cond)
            logits = rows.new_zeros(*tokens.shape, rows.shape[1])
            logits[asked] = rows
            return logits
        whole, place, seen = _begun(tokens, at, valid, told)
        return self.denoiser(whole, at=place, valid=seen, t=t, cond=_rest(cond))

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """The denoiser's rows at the positions `at`; see `row_request`."""
        whole, place, seen = _begun(tokens, at, valid, dict(cond or {}))
        return row_request(self.denoiser)(
            whole, at=place, number=number, valid=seen, t=t, cond=_rest(cond)
        )


def _begun(
    tokens: Tensor, at: Tensor, valid: Tensor | None, told: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, asked places and valid ones (B, W) with the marked rows' own start in front."""
    start, other = told[START], told[OTHER]
    kept = ~(told[REPLACED] & other[:, None])
    kept = kept if valid is None else kept & valid
    # What is kept, in its order, then padding.
    order = (~kept).long().argsort(dim=1, stable=True)
    size = kept.sum(1)
    before = start.shape[1] * other.long()
    place = torch.arange(int((before + size).max()), device=tokens.device)[None]
    behind = place - before[:, None]
    source = order.gather(1, behind.clamp(0, tokens.shape[1] - 1))
    is_kept = (behind >= 0) & (behind < size[:, None])
    in_front = start.gather(1, place.clamp(max=start.shape[1] - 1).expand(len(start), -1))
    whole = torch.where(behind < 0, in_front, tokens.gather(1, source))
    return whole, is_kept & at.gather(1, source), is_kept | (behind < 0)


def _rest(cond: Condition | None) -> dict[str, Tensor] | None:
    own = (OTHER, START, REPLACED)
    return {name: value for name, value in (cond or {}).items() if name not in own} or None
