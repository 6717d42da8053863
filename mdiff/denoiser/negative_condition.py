"""Guidance by a negative prefix: the unconditional branch begins with other tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mdiff.denoiser.calls import check_rows
from mdiff.denoiser.guidance import Call, Guided
from mdiff.denoiser.protocol import Cache, Condition, Denoiser
from mdiff.denoiser.strength import Ramp, Strength, strength_of
from mdiff.errors import ConfigError
from mdiff.tokens import TokenSpace


def negative_prompt(
    denoiser: Denoiser,
    prefix: Tensor,
    *,
    space: TokenSpace,
    guidance_scale: float,
    guidance_schedule: str | Ramp = "constant",
    interval: tuple[float, float] | None = None,
) -> Callable[[Tensor, Tensor | None], NegativePrompt]:
    """`guided` with another branch that begins with `prefix` (N,) int64.

    There the prefix stands instead of all that is given before a row's first hidden position.
    Returns what binds it to a batch: from the canvas (B, L) int64 and its valid positions (B, L)
    bool or None to the guided Denoiser of these rows, which is called on all of them, or by its
    `for_rows` on some. The other options are those of `guided`.
    """
    strength = strength_of(guidance_scale, None, guidance_schedule, interval, space)

    def bound(canvas: Tensor, valid: Tensor | None) -> NegativePrompt:
        hidden = canvas == space.mask_id
        if valid is not None:
            hidden &= valid
        replaced = hidden.cumsum(1) == 0
        return NegativePrompt(denoiser, strength, prefix.to(canvas.device), replaced)

    return bound


class NegativePrompt(Guided):
    """A Denoiser of the rows of one canvas; see `negative_prompt`.

    `replaced` (B, L) bool are the positions instead of which the other branch has `prefix` (N,).
    No position that is asked for may be one of them.
    """

    # Rows of different starts: the blocks of a block model would not be those of the canvas.
    block_length = None

    def __init__(
        self, denoiser: Denoiser, strength: Strength, prefix: Tensor, replaced: Tensor
    ) -> None:
        super().__init__(denoiser, strength)
        self.prefix, self.replaced = prefix, replaced

    def for_rows(self, index: Tensor) -> NegativePrompt:
        """The same for the rows `index` (N,) int64 alone."""
        return NegativePrompt(self.denoiser, self.strength, self.prefix, self.replaced[index])

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
        """Logits (N, V) of the positions `at`; else (B, L, V), 0 at padding and in the prefix."""
        if documents is not None or cache is not None:
            raise ConfigError("a negative prefix takes one document a row and no cache")
        if at is not None:
            return super().__call__(tokens, at=at, valid=valid, t=t, cond=cond)
        inside = ~self.replaced if valid is None else ~self.replaced & valid
        rows = super().__call__(tokens, at=inside, valid=valid, t=t, cond=cond)
        logits = rows.new_zeros(*tokens.shape, rows.shape[1])
        logits[inside] = rows
        return logits

    def has_shadows(self) -> bool:
        """No: the branches have their tokens at other positions."""
        return False

    def call(
        self, tokens: Tensor, rows: Tensor, *, at: Tensor | None, valid: Tensor | None,
        cond: Condition | None,
    ) -> Call:  # fmt: skip
        """The call of the model on all rows and then on `rows` (R,) with the prefix in front.

        What is kept of each row stands side by side, padding behind it: (B + R, W).
        """
        check_rows(tokens, len(self.replaced))
        call = super().call(tokens, rows, at=at, valid=valid, cond=cond)
        device, batch = tokens.device, len(call.tokens)
        other = torch.arange(batch, device=device) >= len(tokens)
        replaced = torch.cat([torch.zeros_like(self.replaced), self.replaced[rows]])
        kept = ~replaced if call.valid is None else ~replaced & call.valid
        # What is kept, in its order, then padding.
        order = (~kept).long().argsort(dim=1, stable=True)
        size = kept.sum(1)
        before = len(self.prefix) * other.long()
        position = torch.arange(int((before + size).max()), device=device)[None]
        behind = position - before[:, None]
        source = order.gather(1, behind.clamp(0, tokens.shape[1] - 1))
        is_kept = (behind >= 0) & (behind < size[:, None])
        prefix = self.prefix[position.clamp(max=len(self.prefix) - 1)]
        whole = torch.where(behind < 0, prefix, call.tokens.gather(1, source))
        requested = None if call.at is None else is_kept & call.at.gather(1, source)
        return Call(whole, requested, is_kept | (behind < 0), call.cond)
