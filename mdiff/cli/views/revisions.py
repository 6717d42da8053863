"""What is marked of a sampler that takes tokens back, in live views, films and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Red, green and blue of a position that is hidden again, and of one with another token than before.
TAKEN_BACK = (214, 51, 132)
REWRITTEN = (32, 110, 230)


class Revisions:
    """The canvases (B, L) that are shown of a batch, in order, beside what was shown before."""

    def __init__(self, canvas: Tensor, mask_id: int) -> None:
        self.mask_id = mask_id
        # The token that each position held last, the mask where none was shown.
        self.last = canvas

    def add(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One more canvas: the positions (B, L) bool taken back, and those rewritten in it.

        Taken back is what is hidden now and held a token before; rewritten is what holds another
        token than the last one that was shown, whether or not it was hidden in between.
        """
        hidden, held = tokens == self.mask_id, self.last != self.mask_id
        rewritten = ~hidden & held & (tokens != self.last)
        self.last = self.last.where(hidden, tokens)
        return hidden & held, rewritten
