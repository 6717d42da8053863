"""Philox-4x32-10 (Salmon et al. 2011): random words that are a function of a counter.

There is no generator and no state: the word at (seed, position, sample, step, lane) is
the same in any batch, on any device and in any order of evaluation.
"""

from __future__ import annotations

import torch
from torch import Tensor

Integer = int | Tensor

# The purposes share a seed but never a counter: lane = purpose << 24 | tile.
DRAW = 0
REVEAL = 1
ORDER = 2
TIME = 3
CORRUPT = 4
NOISE = 5
SEED = 6
STRATUM = 7
DROP = 8
SHUFFLE = 9
DROPOUT = 10

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product; int64 wraps modulo 2^64, which keeps all its bits."""
    product = multiplier * word
    return (product >> 32) & WORD, product & WORD


def words(
    seed: Integer, position: Integer, sample: Integer, step: Integer, lane: Integer
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words of the counter, as int64 tensors of the broadcast shape.

    Key: the 64-bit seed (low, high). Counter: (position, sample, step, lane), each modulo
    2^32. Negative seeds are their two's complement.

    >>> [hex(int(w)) for w in words(0, 0, 0, 0, 0)]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    given = [seed, position, sample, step, lane]
    device = next((g.device for g in given if isinstance(g, Tensor)), torch.device("cpu"))
    key, *counter = [
        g if isinstance(g, Tensor) else torch.tensor(_signed(g), dtype=torch.int64, device=device)
        for g in given
    ]
    k0, k1 = key & WORD, (key >> 32) & WORD
    c0, c1, c2, c3 = (c & WORD for c in counter)
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    # Ten rounds mix every part of the counter into every word, so all have the full shape.
    return c0, c1, c2, c3


def uniform(
    seed: Integer,
    position: Integer,
    sample: Integer,
    step: Integer,
    *,
    purpose: int,
    tile: Integer = 0,
) -> Tensor:
    """One float64 in (0, 1) a counter: (x + 0.5) 2^-32 of the first word, exact in float64."""
    return to_uniform(words(seed, position, sample, step, (purpose << 24) | tile)[0])


def to_uniform(word: Tensor) -> Tensor:
    """The float64 uniform of a 32-bit word; never 0 and never 1."""
    return (word.to(torch.float64) + 0.5) * 2.0**-32


def derive(seed: Integer, *index: Integer) -> Tensor:
    """A 63-bit seed for a sub-stream: (seed, up to three indices) -> int64.

    Block b of a run, request r of a file or step s of a training run each get their own.
    """
    position, sample, step = (*index, 0, 0, 0)[:3]
    low, high, _, _ = words(seed, position, sample, step, SEED << 24)
    return (high & 0x7FFFFFFF) << 32 | low


def _signed(number: int) -> int:
    """The int64 with the same low 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
