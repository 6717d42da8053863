"""The first look at the logits in Triton: what each tile of a row holds, and the random words.

Only imported where Triton is; `draw_triton` says when.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

# Planes of the tiles' figures, each (N, tiles) float32: the largest logit, then sums of weights
# 2^((x - largest) * slope) and of weight times exponent, of the law drawn from and, where the
# temperature is not 1, of the model's. With top_p there are LEVELS more, the masses from a level
# on, at the end.
PEAK = tl.constexpr(0)
MASS = tl.constexpr(1)
MOMENT = tl.constexpr(2)
MODEL_MASS = tl.constexpr(3)
MODEL_MOMENT = tl.constexpr(4)
LEVEL_MASS = tl.constexpr(5)
LEVELS = tl.constexpr(4)
LOG2E = tl.constexpr(1.4426950408889634)
# 2^-150 is 0 in float32; the floor keeps 0 * -inf out of the moments.
LOWEST = tl.constexpr(-150.0)


@triton.jit
def load_where(pointer, ok, other):
    """What lies there, float32, and `other` where not `ok`; None is everywhere."""
    x = tl.load(pointer) if ok is None else tl.load(pointer, mask=ok, other=other)
    return x.to(tl.float32)


@triton.jit
def logits_at(source, row, column, ok):
    """The logits of a row at some columns after guidance, float32; -inf where not `ok`.

    u + s (c - u), -inf where both are; where s, of one element, is 1 the other branch is not
    read.
    """
    logits, stride, unconditional, other_stride, s = source
    far = row.to(tl.int64)
    x = load_where(logits + far * stride + column, ok, -float("inf"))
    if unconditional is not None:
        mixes = (s != 1.0) & (column >= 0 if ok is None else ok)
        u = load_where(unconditional + far * other_stride + column, mixes, 0.0)
        gone = (x == -float("inf")) & (u == -float("inf"))
        x = tl.where(mixes, tl.where(gone, x, u + s * (x - u)), x)
    return x


@triton.jit
def permitted_at(x, next_id, column, ok):
    """The logits with -inf at forbidden ids: those whose next permitted id is another."""
    if next_id is not None:
        x = tl.where(tl.load(next_id + column, mask=ok) == column, x, -float("inf"))
    return x


@triton.jit
def bounds(span, span_stride, row, vocab):
    """First and stop of the columns that a row may draw, int32."""
    first = row * 0
    stop = first + vocab
    if span is not None:
        at = span + row.to(tl.int64) * span_stride
        first = tl.minimum(tl.maximum(tl.load(at), 0), vocab).to(tl.int32)
        stop = tl.maximum(tl.minimum(tl.load(at + 1), vocab), 0).to(tl.int32)
    return first, stop


@triton.jit
def weigh(x, peak_G, slope):
    """Weights in a group, and mass and moment of its tiles by their largest logits; NaN stays."""
    z = tl.maximum((x - peak_G[:, None]) * slope, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.exp2(z)
    return weight, tl.sum(weight, 1), tl.sum(weight * z, 1)


@triton.jit
def inner_groups(range_, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Where the groups start and stop, and between them those of which all columns count."""
    begin, end, first, stop = range_
    start = begin // GROUP * GROUP
    inner = (tl.maximum(first, begin * TILE) + GROUP * TILE - 1) // (GROUP * TILE) * GROUP
    outer = tl.minimum(stop, end * TILE) // (GROUP * TILE) * GROUP
    # Without such a group all of them are looked at one by one.
    nowhere = inner >= outer
    beyond = start + (end - start + GROUP - 1) // GROUP * GROUP
    return start, tl.where(nowhere, beyond, inner), tl.where(nowhere, beyond, outer), beyond


@triton.jit
def read_group(source, forbidden, row, tile, range_, figures, plane, filters, slope,
               WHOLE: tl.constexpr, TWO_LAWS: tl.constexpr, PIECES: tl.constexpr,
               TILE: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Write the figures of GROUP tiles; WHOLE where all their columns are read."""
    next_id, holds_forbidden = forbidden
    begin, end, first, stop = range_
    maxima, level_masses, levels = filters
    tile_G = tile + tl.arange(0, GROUP)
    here_G = (tile_G >= begin) & (tile_G < end)
    column = tile_G[:, None] * TILE + tl.arange(0, TILE)[None, :]
    ok = None
    if not WHOLE:
        ok = (column >= first) & (column < stop) & here_G[:, None]
    x = logits_at(source, row, column, ok)
    if next_id is not None:
        holds = tl.max(tl.load(holds_forbidden + tile_G, mask=here_G, other=0), 0)
        if holds > 0:
            x = permitted_at(x, next_id, column, ok)
    if maxima is not None:
        piece_GP = tl.max(tl.reshape(x, [GROUP, PIECES, TILE // PIECES]), 2)
        piece = tile_G[:, None] * PIECES + tl.arange(0, PIECES)[None, :]
        tl.store(maxima + piece, piece_GP, mask=here_G[:, None])
        peak_G = tl.max(piece_GP, 1)
    else:
        peak_G = tl.max(x, 1)
    origin_G = tl.where(peak_G == -float("inf"), 0.0, peak_G)
    weight, mass_G, moment_G = weigh(x, origin_G, slope)
    tl.store(figures + PEAK * plane + tile_G, peak_G, mask=here_G)
    tl.store(figures + MASS * plane + tile_G, mass_G, mask=here_G)
    tl.store(figures + MOMENT * plane + tile_G, moment_G, mask=here_G)
    if TWO_LAWS:
        _, mass_G, moment_G = weigh(x, origin_G, LOG2E)
        tl.store(figures + MODEL_MASS * plane + tile_G, mass_G, mask=here_G)
        tl.store(figures + MODEL_MOMENT * plane + tile_G, moment_G, mask=here_G)
    if levels is not None:
        for j in tl.static_range(LEVELS):
            mass_G = tl.sum(tl.where(x >= tl.load(levels + j), weight, 0.0), 1)
            tl.store(level_masses + j * plane + tile_G, mass_G, mask=here_G)


@triton.jit
def read_tiles(source, forbidden, row, range_, figures, plane, filters, slope,
               TWO_LAWS: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr,
               GROUP: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Write the figures of the tiles from `begin` up to `end` of one row, GROUP at a time.

    `filters` are None, or memory for the largest logit of each of the PIECES pieces of a tile,
    and for top_p alone memory for the mass from each of the LEVELS levels on, and these.
    Groups of which every column is read take no mask, so that their loads are wide and early.
    """
    start, inner, outer, beyond = inner_groups(range_, GROUP, TILE)
    for tile in tl.range(inner, outer, GROUP, num_stages=STAGES):
        read_group(
            source, forbidden, row, tile, range_, figures, plane, filters, slope,
            True, TWO_LAWS, PIECES, TILE, GROUP,
        )  # fmt: skip
    for other in range(start, beyond - (outer - inner), GROUP):
        tile = tl.where(other < inner, other, other + (outer - inner))
        read_group(
            source, forbidden, row, tile, range_, figures, plane, filters, slope,
            False, TWO_LAWS, PIECES, TILE, GROUP,
        )  # fmt: skip


@triton.jit
def philox(seed, position, sample, step, lane):
    """The first two words of the counter (position, sample, step, lane), see `philox.words`."""
    a = lane * 0 + position.to(tl.uint32)
    b = lane * 0 + sample.to(tl.uint32)
    c = lane * 0 + step.to(tl.uint32)
    d = lane
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        left_high, left = tl.umulhi(a, a * 0 + 0xD2511F53), a * 0xD2511F53
        right_high, right = tl.umulhi(c, c * 0 + 0xCD9E8D57), c * 0xCD9E8D57
        a = right_high ^ b ^ low
        b = right
        c = left_high ^ d ^ high
        d = left
        low = low + 0x9E3779B9
        high = high + 0xBB67AE85
    return a, b


@triton.jit
def to_uniform(word):
    """(x + 0.5) 2^-32 in float64: exact, never 0 and never 1."""
    return (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
