"""Philox-4x32-10 (Salmon et al. 2011): random words that are a function of a counter.

There is no generator and no state: the word at (seed, position, sample, step, lane) is
the same in any batch, on any device and in any order of evaluation.
"""

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
    key, *counter = torch.broadcast_tensors(  # type: ignore[no-untyped-call]
        *(
            g
            if isinstance(g, Tensor)
            else torch.tensor(_signed(g), dtype=torch.int64, device=device)
            for g in given
        )
    )
    # The two halves of the block, (c0, c2) and (c1, c3), go through a round as one tensor.
    halves = (2, *[1] * key.dim())
    multiplied = torch.stack([counter[0], counter[2]]) & WORD
    carried = torch.stack([counter[1], counter[3]]) & WORD
    keys = torch.stack([key, key >> 32]) & WORD
    multiplier, weyl = (
        torch.tensor(pair, dtype=torch.int64, device=device).view(halves)
        for pair in (MULTIPLIERS, WEYL)
    )
    for _ in range(ROUNDS):
        # int64 wraps modulo 2^64, which keeps all bits of the product of two 32-bit words.
        product = (multiplier * multiplied).flip(0)
        multiplied = ((product >> 32) & WORD) ^ carried ^ keys
        carried = product & WORD
        keys = (keys + weyl) & WORD
    return multiplied[0], carried[0], multiplied[1], carried[1]


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
    return to_uniform(words(seed, position, sample, step, (purpose << 24) + tile)[0])


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
