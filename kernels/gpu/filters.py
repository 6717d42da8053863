"""What top_k, top_p and min_p keep of a row, in Triton: the edge, and the mass of each tile.

The kept ids are the first of the order (logit falling, id rising), so that one pair says which:
(edge, last): a logit above `edge`, or equal to it at an id up to `last`.

The row is looked at a second time once, and only in pieces whose largest logit reaches a bound:
the k-th largest of the pieces' maxima; the lower of the two levels between which the edge of
top_p lies; the floor of min_p. Ids from there up to the upper level go into a list, and the edge
is the largest value of the list from which on a count or a mass reaches its target.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

from mdiff.kernels.gpu.tiles import logits_at, permitted_at
from mdiff.kernels.gpu.top_p_levels import bracket

WAYS = tl.constexpr(4)
# Values of a list that are looked at together, and those of one tile.
LANES = tl.constexpr(512)
TILE_LANES = tl.constexpr(8)
# Later than any id.
NO_ID = tl.constexpr(2147483647)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def key_of(x):
    """The rank of a float32 among all of them in rising order, int64."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def float_of(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def is_kept(x, column, edge, last):
    """Which ids lie above the edge, or on it and not after `last`."""
    return (x > edge) | ((x == edge) & (column <= last))


@triton.jit
def weights(x, peak, slope, COUNT: tl.constexpr):
    """What an id adds to the target: 1 in a count, else its weight relative to the peak."""
    return tl.where(x == x, 1.0, 0.0) if COUNT else tl.exp2((x - peak) * slope)


@triton.jit
def entries(found, start, edge, last):
    """LANES values of a list and their columns, and which of them (edge, last) keeps.

    A list without columns is kept whole.
    """
    value, column, length = found
    slot = start + tl.arange(0, LANES)
    there = slot < length
    x = tl.load(value + slot, mask=there, other=-float("inf"))
    at = slot * 0
    if column is not None:
        at = tl.load(column + slot, mask=there, other=NO_ID)
        there = there & is_kept(x, at, edge, last)
    return x, at, there


@triton.jit
def ends(found, edge, last):
    """The smallest and the largest kept value of a list; inf and -inf where there is none."""
    smallest = edge * 0.0 + float("inf")
    largest = -smallest
    for start in range(0, found[2], LANES):
        x, _, kept = entries(found, start, edge, last)
        smallest = tl.minimum(smallest, tl.min(tl.where(kept, x, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(kept, x, -float("inf")), 0))
    return smallest, largest


@triton.jit
def edge_of(found, law, edge, last, above, target, COUNT: tl.constexpr):
    """The largest kept value from which on `above` and the list reach the target, or the smallest.

    The interval of values is cut at WAYS points a look, and shrinks to values that are in the
    list, so that it is done as soon as they are all equal; inf for an empty list.
    """
    peak, slope = law
    smallest, largest = ends(found, edge, last)
    way_W = tl.arange(0, WAYS)
    while smallest < largest:
        apart = key_of(largest) - key_of(smallest)
        cut_W = float_of(key_of(smallest) + (apart * (way_W + 1) + WAYS - 1) // WAYS)
        reached_W = above + (way_W * 0).to(tl.float64)
        next_W = cut_W * 0.0 + largest
        before_W = cut_W * 0.0 + smallest
        for start in range(0, found[2], LANES):
            x, _, kept = entries(found, start, edge, last)
            weight = tl.where(kept, weights(x, peak, slope, COUNT), 0.0)
            from_NW = x[:, None] >= cut_W[None, :]
            reached_W += tl.sum(tl.where(from_NW, weight[:, None], 0.0), 0)
            behind = tl.where(from_NW & kept[:, None], x[:, None], float("inf"))
            next_W = tl.minimum(next_W, tl.min(behind, 0))
            before = tl.where(from_NW | (kept[:, None] == 0), -float("inf"), x[:, None])
            before_W = tl.maximum(before_W, tl.max(before, 0))
        passed = tl.sum((reached_W >= target).to(tl.int32), 0)
        # The value from which on it is reached, and the last one before it is not any more.
        next_ = tl.sum(tl.where(way_W == passed - 1, next_W, 0.0), 0)
        before_ = tl.sum(tl.where(way_W == passed, before_W, 0.0), 0)
        smallest = tl.where(passed > 0, next_, smallest)
        largest = tl.where(passed < WAYS, before_, largest)
    return smallest


@triton.jit
def kept_sum(found, law, edge, last, COUNT: tl.constexpr):
    """Count or mass of the listed ids that (edge, last) keeps, float64."""
    peak, slope = law
    total = (peak * 0.0).to(tl.float64)
    for start in range(0, found[2], LANES):
        x, _, kept = entries(found, start, edge, last)
        total += tl.sum(tl.where(kept, weights(x, peak, slope, COUNT), 0.0), 0)
    return total


@triton.jit
def tied_id(found, edge, number):
    """The id of the `number`-th of those on the edge, from 1; NO_ID where there are fewer."""
    result = number * 0 + NO_ID
    before = number * 0
    for start in range(0, found[2], LANES):
        x, column, kept = entries(found, start, edge, NO_ID)
        tie = (kept & (x == edge)).to(tl.int32)
        there = (tie > 0) & (before + tl.cumsum(tie, 0) == number)
        result = tl.minimum(result, tl.min(tl.where(there, column, NO_ID), 0))
        before += tl.sum(tie, 0)
    return result


@triton.jit
def cut(found, law, edge, last, above, high, target, COUNT: tl.constexpr):
    """The (edge, last) that keeps the fewest of the kept ids whose count or mass is `target`.

    `above` is the count or mass of the ids from `high` on, which are not in the list.
    """
    peak, slope = law
    tied = tl.minimum(edge_of(found, law, edge, last, above, target, COUNT), high)
    higher = above + kept_sum(found, law, tied, -1, COUNT)
    each = weights(tied, peak, slope, COUNT).to(tl.float64)
    number = tl.minimum(tl.maximum(tl.ceil((target - higher) / each), 1.0), 2147483000.0)
    tie = tied_id(found, tied, number.to(tl.int32))
    # On the edge that was there before, its own last id may come sooner.
    return tied, tl.where(tied == edge, tl.minimum(tie, last), tie)


@triton.jit
def list_pieces(maximum, piece, bound, maxima, listed, here):
    """Write the pieces that reach the bound, rising, and 0 ids for each piece; their number."""
    reaches = (maximum >= bound).to(tl.int32)
    tl.store(listed + tl.cumsum(reaches, 0) - 1, piece, mask=reaches > 0)
    tl.store(maxima + piece, tl.where(reaches < 0, maximum, 0.0), mask=here)
    return tl.sum(reaches, 0)


@triton.jit
def list_ids(source, next_id, row, reach, law, low, high, memory,
             DRAWN: tl.constexpr, QUEUE: tl.constexpr, PIECE: tl.constexpr):  # fmt: skip
    """List the ids from `low` up to `high` of the listed pieces, rising, and count each piece's.

    Returns their number, and of the ids from `high` on their number and moment, where DRAWN.
    """
    length, first, stop = reach
    maxima, listed, value, listed_column = memory
    peak, slope = law
    lane, size, number = tl.arange(0, QUEUE * PIECE), row * 0, row * 0
    moment = (peak * 0.0).to(tl.float64)
    for start in range(0, length, QUEUE):
        index = start + lane // PIECE
        column = tl.load(listed + index, mask=index < length, other=0) * PIECE + lane % PIECE
        ok = (index < length) & (column >= first) & (column < stop)
        x = permitted_at(logits_at(source, row, column, ok), next_id, column, ok)
        inside = ((x >= low) & (x < high)).to(tl.int32)
        at = size + tl.cumsum(inside, 0) - 1
        tl.store(value + at, x, mask=inside > 0)
        tl.store(listed_column + at, column, mask=inside > 0)
        count = tl.sum(tl.reshape(inside, [QUEUE, PIECE]), 1)
        slot = start + tl.arange(0, QUEUE)
        piece = tl.load(listed + slot, mask=slot < length, other=0)
        tl.store(maxima + piece, count.to(tl.float32), mask=slot < length)
        size += tl.sum(inside, 0)
        if DRAWN:
            z = tl.where(x >= high, (x - peak) * slope, 0.0)
            moment += tl.sum(tl.where(x >= high, tl.exp2(z) * z, 0.0), 0)
            number += tl.sum((x >= high).to(tl.int32), 0)
    return size, number, moment


@triton.jit
def kept_masses(memory, tile_K, here_K, law, edge, last, PIECES: tl.constexpr):
    """Mass of the kept listed ids of each tile; moment and number of all of them."""
    maxima, _, value, listed_column = memory
    peak, slope = law
    piece = tile_K[:, None] * PIECES + tl.arange(0, PIECES)[None, :]
    count_K = tl.sum(tl.load(maxima + piece, mask=here_K[:, None], other=0.0), 1).to(tl.int32)
    start_K = tl.cumsum(count_K, 0) - count_K
    mass_K = (count_K * 0).to(tl.float64)
    moment, number = (peak * 0.0).to(tl.float64), tl.sum(count_K * 0, 0)
    for begin in range(0, tl.max(count_K, 0), TILE_LANES):
        rank = begin + tl.arange(0, TILE_LANES)
        there = rank[None, :] < count_K[:, None]
        slot = start_K[:, None] + rank[None, :]
        x = tl.load(value + slot, mask=there, other=-float("inf"))
        kept = there & is_kept(x, tl.load(listed_column + slot, mask=there, other=0), edge, last)
        z = tl.where(kept, (x - peak) * slope, 0.0)
        weight = tl.where(kept, tl.exp2(z), 0.0)
        mass_K += tl.sum(weight, 1)
        # The lowest kept weight may be 0 with an exponent of -inf.
        moment += tl.sum(tl.sum(tl.where(weight > 0.0, weight * z, 0.0), 1), 0)
        number += tl.sum(tl.sum(kept.to(tl.int32), 1), 0)
    return mass_K, moment, number


@triton.jit
def filtered(source, next_id, row, range_, law, total, tiles, level_masses, memory, levels,
             options, DRAWN: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
             MIN_P: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr,
             TILES: tl.constexpr, QUEUE: tl.constexpr):  # fmt: skip
    """Edge and last id of what the filters keep; masses of the tiles, moment and number of it."""
    tile_K, here_K, factor_K = tiles
    top_k, top_p, tail, floor, heat = options
    begin, end, first, stop = range_
    maxima, listed, value, column = memory
    peak = law[0]
    low, high = peak * 0.0 - LARGEST, peak * 0.0 + float("inf")
    above_K = factor_K * 0.0
    if MIN_P:
        low = tl.maximum(peak + floor, low)
    if TOP_K:
        pieces = (maxima + begin * PIECES, None, (end - begin) * PIECES)
        bound = edge_of(pieces, law, low, NO_ID, total * 0.0, top_k, True)
        low = tl.maximum(low, tl.where(bound < float("inf"), bound, low))
    elif TOP_P:
        low = tl.maximum(low, (peak + (heat * tl.log(total) + tail)).to(tl.float32))
        figures, plane = level_masses
        low, high, above_K = bracket(
            figures, plane, levels, tile_K, here_K, factor_K, top_p * total, low
        )
    piece = tl.arange(0, TILES * PIECES)
    here = (piece >= begin * PIECES) & (piece < end * PIECES)
    maximum = tl.load(maxima + piece, mask=here, other=-float("inf"))
    # All have their maxima before any is overwritten.
    tl.debug_barrier()
    length = list_pieces(maximum, piece, low, maxima, listed, here)
    tl.debug_barrier()
    size, number_above, moment_above = list_ids(
        source, next_id, row, (length, first, stop), law, low, high, memory, DRAWN, QUEUE, PIECE
    )
    tl.debug_barrier()
    found = (value, column, size)
    edge, last = low, row * 0 + NO_ID
    if TOP_K:
        edge, last = cut(found, law, edge, last, total * 0.0, high, top_k, True)
    if TOP_P:
        above = tl.sum(above_K, 0)
        mass = kept_sum(found, law, edge, last, False) if TOP_K else total
        edge, last = cut(found, law, edge, last, above, high, top_p * mass, False)
    mass_K, moment, number = kept_masses(memory, tile_K, here_K, law, edge, last, PIECES)
    return edge, last, mass_K + above_K, moment + moment_above, number + number_above
