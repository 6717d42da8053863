"""Draws given all other tokens: what the law of a standing token would be without it."""

import torch
from torch import Tensor

from mdiff.denoiser import Denoiser, Shadowed, flat_positions, has_shadows
from mdiff.ops import Draw
from mdiff.sampling.unmasking import Unmasking


def shadowed(denoiser: Denoiser, mask_id: int) -> Denoiser:
    """The denoiser as `ask_left_out` calls it: by its shadows, where it has them."""
    shadows: object = denoiser
    return Shadowed(denoiser, shadows, mask_id) if has_shadows(shadows) else denoiser


def ask_left_out(fill: Unmasking, at: Tensor, step: int, t: Tensor) -> tuple[Draw, Tensor]:
    """Draw for each position `at` (B, L) bool, row-major, given all tokens but its own; one round.

    Also the log-probabilities (N,) of the ids that stand there, without a meaning at a mask. One
    call where the denoiser is `shadowed`; else all masks share a canvas, and each standing token
    has one where it is hidden, which counts as a call of its sample and is given the same time.
    """
    if isinstance(fill.denoiser, Shadowed):
        return fill.ask_beside(at, step, t, number=at.sum(1).tolist())
    length = at.shape[1]
    hidden, standing = at & fill.hidden, flat_positions(at & ~fill.hidden)
    sample = torch.cat([hidden.any(1).nonzero()[:, 0], standing // length])
    canvases = len(sample) - len(standing)
    alone = torch.arange(length, device=at.device) == (standing % length)[:, None]
    requested = torch.cat([hidden[sample[:canvases]], alone])
    # In the order of the canvases; `order` is that of the positions.
    fill.positions, order = torch.cat([flat_positions(hidden), standing]).sort()
    rows = fill.evaluate(
        tuple(sample.tolist()), torch.where(requested, fill.mask_id, fill.tokens[sample]),
        requested, t[sample], number=len(order),
    )  # fmt: skip
    rows = rows.some(order)
    return fill.draw.of_features(
        rows.conditional, rows.head, standing=fill.tokens.flatten()[fill.positions],
        read=None, **fill.counters(rows, step),
    )  # fmt: skip
