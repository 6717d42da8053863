"""Ids as bits and back, the most significant bit first, and the other way round."""

import torch
from torch import Tensor


def bits_of(ids: Tensor, count: int) -> Tensor:
    """The bits (..., count), 0 or 1, of ids; the most significant first.

    >>> bits_of(torch.tensor([1, 6]), 3).tolist()
    [[0, 0, 1], [1, 1, 0]]
    """
    return ids[..., None] >> torch.arange(count - 1, -1, -1, device=ids.device) & 1


def ids_of(bits: Tensor) -> Tensor:
    """The ids (...) int64 of bits (..., count), 0 or 1, the most significant first."""
    count = bits.shape[-1]
    return (bits.long() << torch.arange(count - 1, -1, -1, device=bits.device)).sum(-1)


def other_bit_order(ids: Tensor, count: int) -> Tensor:
    """Ids whose most significant bit comes first as ids whose least does, and back.

    This package and vector-quantize-pytorch read the first feature as the highest bit, MaskBit
    (Weber et al. 2024) as the lowest.

    >>> other_bit_order(torch.tensor([1, 512]), 10).tolist()
    [512, 1]
    """
    return ids_of(bits_of(ids, count).flip(-1))
