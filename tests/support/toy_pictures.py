"""Small pictures that a codec can learn."""

from __future__ import annotations

import torch
from torch import Tensor


def toy_pictures(count: int, channels: int, size: tuple[int, int] = (16, 16)) -> Tensor:
    """Slanted waves of random slope and phase, in whole multiples of 4."""
    random = torch.Generator().manual_seed(count * 7 + channels)
    slope = torch.rand(2, count, channels, 1, 1, generator=random) * 1.2 - 0.6
    phase = torch.rand(count, channels, 1, 1, generator=random) * 6.28
    down, right = torch.arange(size[0])[:, None], torch.arange(size[1])
    waves = torch.sin(slope[0] * down + slope[1] * right + phase)
    return ((waves + 1) * 31.5).round().to(torch.uint8) * 4
