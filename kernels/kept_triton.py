"""What top_k, top_p and min_p keep of a row, in Triton: the edge, and the mass of each tile.

The kept ids are the first of the order (logit falling, id rising), so that one pair says which:
(edge, last): a logit above `edge`, or equal to it at an id up to `last`. The edge is the largest
float at which a count or a mass of all logits from there on still reaches its target: found by
narrowing an interval of order-preserving keys to one float, WAYS thresholds at a time.

A second look is had only at pieces of the row whose largest logit reaches a bound that follows
from the pieces' maxima alone: the k-th largest of them; p of the mass in maxima, or (1 - p) / V
of it for a single id; the floor of min_p.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

from mdiff.kernels.tiles_triton import logits_at, permitted_at

WAYS = tl.constexpr(4)
# Later than any id.
NO_ID = tl.constexpr(2147483647)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def key_of(x):
    """The place of a float32 among all of them in rising order, int64."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def float_of(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def thresholds(low, high):
    """WAYS keys from `low` on, evenly up to `high`, and the distance between them."""
    apart = (high - low + WAYS - 1) // WAYS
    return tl.minimum(low + apart * tl.arange(0, WAYS), high), apart


@triton.jit
def narrowed(low, high, apart, reached_W, target):
    """The part of the interval that holds the last threshold at which the target is reached."""
    passed = tl.sum((reached_W >= target).to(tl.int64), 0)
    low = low + tl.maximum(passed - 1, 0) * apart
    return low, tl.minimum(high, low + apart)


@triton.jit
def weights(x, peak, slope, COUNT: tl.constexpr):
    """What an id adds to the target: 1 in a count, else its weight relative to the peak."""
    return tl.where(x == x, 1.0, 0.0) if COUNT else tl.exp2((x - peak) * slope)


@triton.jit
def bound_of(maximum, low, law, target, COUNT: tl.constexpr):
    """The largest float, or `low`, at which maxima of pieces alone reach the target."""
    peak, slope = law
    key, stop = key_of(low), key_of(peak) + 1
    weight = weights(maximum, peak, slope, COUNT)
    while stop - key > 1:
        key_W, apart = thresholds(key, stop)
        reaches = maximum[:, None] >= float_of(key_W)[None, :]
        reached_W = tl.sum(tl.where(reaches, weight[:, None], 0.0), 0).to(tl.float64)
        key, stop = narrowed(key, stop, apart, reached_W, target)
    return float_of(key)


@triton.jit
def candidates(source, next_id, row, reach, start, QUEUE: tl.constexpr,
               PIECE: tl.constexpr):  # fmt: skip
    """Logits and columns of QUEUE listed pieces from `start` on, by rising column."""
    listed, length, first, stop = reach
    lane = tl.arange(0, QUEUE * PIECE)
    slot = start + lane // PIECE
    piece = tl.load(listed + slot, mask=slot < length, other=0)
    column = piece * PIECE + lane % PIECE
    ok = (slot < length) & (column >= first) & (column < stop)
    return permitted_at(logits_at(source, row, column, ok), next_id, column, ok), column


@triton.jit
def is_kept(x, column, edge, last):
    """Which ids lie above the edge, or on it and not after `last`."""
    return (x > edge) | ((x == edge) & (column <= last))


@triton.jit
def kept_sum(source, next_id, row, reach, law, edge, last,
             COUNT: tl.constexpr, QUEUE: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """Count or mass of the ids that (edge, last) keeps, float64."""
    peak, slope = law
    total = (peak * 0.0).to(tl.float64)
    for start in range(0, reach[1], QUEUE):
        x, column = candidates(source, next_id, row, reach, start, QUEUE, PIECE)
        weight = tl.where(is_kept(x, column, edge, last), weights(x, peak, slope, COUNT), 0.0)
        total += tl.sum(weight, 0)
    return total


@triton.jit
def tied_id(source, next_id, row, reach, edge, number,
            QUEUE: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """The id of the `number`-th of those on the edge, from 1; NO_ID where there are fewer."""
    found = row * 0 + NO_ID
    seen = row * 0
    for start in range(0, reach[1], QUEUE):
        x, column = candidates(source, next_id, row, reach, start, QUEUE, PIECE)
        tie = (x == edge).to(tl.int32)
        there = (tie > 0) & (seen + tl.cumsum(tie, 0) == number)
        found = tl.minimum(found, tl.min(tl.where(there, column, NO_ID), 0))
        seen += tl.sum(tie, 0)
    return found


@triton.jit
def cut(source, next_id, row, reach, law, edge, last,
        target, COUNT: tl.constexpr, QUEUE: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """The (edge, last) that keeps the fewest of the kept ids whose count or mass is `target`."""
    peak, slope = law
    key, stop = key_of(edge), key_of(peak) + 1
    while stop - key > 1:
        key_W, apart = thresholds(key, stop)
        value_W = float_of(key_W)
        reached_W = (key_W * 0).to(tl.float64)
        for start in range(0, reach[1], QUEUE):
            x, column = candidates(source, next_id, row, reach, start, QUEUE, PIECE)
            weight = tl.where(is_kept(x, column, edge, last), weights(x, peak, slope, COUNT), 0.0)
            reaches = x[:, None] >= value_W[None, :]
            reached_W += tl.sum(tl.where(reaches, weight[:, None], 0.0), 0)
        key, stop = narrowed(key, stop, apart, reached_W, target)
    tied = float_of(key)
    above = kept_sum(source, next_id, row, reach, law, tied, row * 0 - 1, COUNT, QUEUE, PIECE)
    each = weights(tied, peak, slope, COUNT).to(tl.float64)
    number = tl.minimum(tl.maximum(tl.ceil((target - above) / each), 1.0), 2147483000.0)
    found = tied_id(source, next_id, row, reach, tied, number.to(tl.int32), QUEUE, PIECE)
    # On the edge that was there before, its own last id may come sooner.
    return tied, tl.where(tied == edge, tl.minimum(found, last), found)


@triton.jit
def list_pieces(maximum, piece, bound, maxima, listed, here):
    """Write the pieces that reach the bound, rising, and 0 for the mass of all; their number."""
    reaches = (maximum >= bound).to(tl.int32)
    tl.store(listed + tl.cumsum(reaches, 0) - 1, piece, mask=reaches > 0)
    tl.store(maxima + piece, tl.where(reaches < 0, maximum, 0.0), mask=here)
    return tl.sum(reaches, 0)


@triton.jit
def kept_masses(source, next_id, row, reach, law, edge, last,
                maxima, QUEUE: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """Write the kept mass of each listed piece; the moment and the count of all, float64."""
    peak, slope = law
    listed, length = reach[0], reach[1]
    moment = (peak * 0.0).to(tl.float64)
    count = row * 0
    for start in range(0, length, QUEUE):
        x, column = candidates(source, next_id, row, reach, start, QUEUE, PIECE)
        kept = is_kept(x, column, edge, last)
        z = tl.where(kept, (x - peak) * slope, 0.0)
        weight = tl.where(kept, tl.exp2(z), 0.0)
        slot = start + tl.arange(0, QUEUE)
        piece = tl.load(listed + slot, mask=slot < length, other=0)
        mass = tl.sum(tl.reshape(weight, [QUEUE, PIECE]), 1)
        tl.store(maxima + piece, mass, mask=slot < length)
        # The lowest kept weight may be 0 with an exponent of -inf.
        moment += tl.sum(tl.where(weight > 0.0, weight * z, 0.0), 0)
        count += tl.sum(kept.to(tl.int32), 0)
    return moment, count
