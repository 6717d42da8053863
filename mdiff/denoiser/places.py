"""The places that a denoiser is asked for, numbered without a wait for the device.

How many places a mask holds decides the shape of what is gathered there. A sampler knows it from
its own counts, a model would have to ask the device: so the sampler leaves a note on the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOTE = "mdiff_number"


def counted(at: Tensor, number: int) -> Tensor:
    """The same mask (B, L) bool, with a note that `number` places are in it.

    A note is lost where the mask is copied or moved: `places_of` then counts.

    >>> places_of(counted(torch.tensor([[False, True]]), 1))
    tensor([1])
    """
    setattr(at, NOTE, number)
    return at


def number_of(at: Tensor) -> int | None:
    """What `counted` noted of a mask; None where nothing did."""
    number: int | None = getattr(at, NOTE, None)
    return number


def places_of(at: Tensor) -> Tensor:
    """The numbers (N,) int64 of the places `at` (B, L) bool among all B * L, rising.

    Nothing waits for the device where the mask is `counted`.
    """
    number = number_of(at)
    if number is None:
        return at.flatten().nonzero()[:, 0]
    return torch.nonzero_static(at.flatten(), size=number)[:, 0]
