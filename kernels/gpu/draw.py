"""The draw's kernel in Triton: the tiles of a row, then from their figures an id and its own.

One kernel in two parts. READ: a program reads a run of the tiles of one row. FINISH: one program
a row takes the tiles' figures as vectors. With enough rows both are one launch, a program a row;
with few the rows are split and FINISH is a second launch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

from mdiff.kernels.gpu.filters import NO_ID, filtered, is_kept
from mdiff.kernels.gpu.tiles import (
    LEVEL_MASS,
    LEVELS,
    LOG2E,
    MASS,
    MODEL_MASS,
    MODEL_MOMENT,
    MOMENT,
    PEAK,
    bounds,
    logits_at,
    permitted_at,
    philox,
    read_tiles,
    to_uniform,
)
from mdiff.kernels.gpu.top_p_levels import sample_levels

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def relative_to(peak, peak_K, mass_K, moment_K, slope):
    """Factors and masses of the tiles by the row's peak, float64; the row's mass and moment."""
    full = mass_K > 0.0
    shift_K = tl.where(full, (peak_K - peak).to(tl.float64) * slope, 0.0)
    factor_K = tl.where(full, tl.exp(shift_K * LN2), 0.0)
    mass_K = tl.where(full, mass_K.to(tl.float64) * factor_K, 0.0)
    moment_K = tl.where(full, moment_K.to(tl.float64) * factor_K + shift_K * mass_K, 0.0)
    return factor_K, mass_K, tl.sum(mass_K, 0), tl.sum(moment_K, 0)


@triton.jit
def reservoir(mass_K, seed, position, sample, step, TILES: tl.constexpr):
    """The last accepted tile and the word that picks inside it."""
    tile_K = tl.arange(0, TILES)
    accept_K, pick_K = philox(seed, position, sample, step, tile_K.to(tl.uint32))
    accepted_K = (mass_K > 0.0) & (to_uniform(accept_K) * tl.cumsum(mass_K, 0) < mass_K)
    winner = tl.maximum(tl.max(tl.where(accepted_K, tile_K, 0), 0), 0)
    return winner, tl.sum(tl.where(tile_K == winner, pick_K, 0), 0)


@triton.jit
def tile_at(source, next_id, row, tile, first, stop, TILE: tl.constexpr):
    """Logits and columns of one tile, looked at once more."""
    column = tile * TILE + tl.arange(0, TILE)
    ok = (column >= first) & (column < stop)
    return permitted_at(logits_at(source, row, column, ok), next_id, column, ok), column


@triton.jit
def weights_inside(x, column, slope, edge, last, FILTERED: tl.constexpr):
    """Weights of the ids of one tile, float64, by its own largest logit: none underflows whole."""
    weight = tl.exp2((x - tl.max(x, 0)) * slope)
    if FILTERED:
        weight = tl.where(is_kept(x, column, edge, last), weight, 0.0)
    return weight.to(tl.float64)


@triton.jit
def inside(x, column, slope, edge, last, pick, FILTERED: tl.constexpr,
           TILE: tl.constexpr):  # fmt: skip
    """The lane of the id in the winner: the inverse of the cumulative weight, in float64."""
    cumulative = tl.cumsum(weights_inside(x, column, slope, edge, last, FILTERED), 0)
    target = to_uniform(pick) * tl.max(cumulative, 0)
    return tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), TILE - 1)


@triton.jit
def peak_and_second(x, tile, peak, peak_K, TILES: tl.constexpr, TILE: tl.constexpr):
    """The lane of the first maximum in its tile, and the row's second largest logit."""
    lane = tl.arange(0, TILE)
    at = tl.min(tl.where(x == peak, lane, TILE - 1), 0)
    here = tl.max(tl.where(lane == at, -float("inf"), x), 0)
    elsewhere = tl.max(tl.where(tl.arange(0, TILES) == tile, -float("inf"), peak_K), 0)
    return at, tl.maximum(here, elsewhere)


@triton.jit
def finish_row(source, next_id, row, range_, figures, plane,
               memory, levels, stream, slope, options,
               GREEDY: tl.constexpr, DRAWN: tl.constexpr, TWO_LAWS: tl.constexpr,
               TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
               TILES: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr,
               QUEUE: tl.constexpr):  # fmt: skip
    """Id, log-probability, entropy and margin of one row; whether the row has a law."""
    FILTERED: tl.constexpr = TOP_K or TOP_P or MIN_P
    begin, end, first, stop = range_
    tile_K = tl.arange(0, TILES)
    here_K = (tile_K >= begin) & (tile_K < end)
    peak_K = tl.load(figures + PEAK * plane + tile_K, mask=here_K, other=-float("inf"))
    mass_K = tl.load(figures + MASS * plane + tile_K, mask=here_K, other=0.0)
    moment_K = tl.load(figures + MOMENT * plane + tile_K, mask=here_K, other=0.0)
    broken = tl.max((mass_K != mass_K).to(tl.int32), 0)
    peak = tl.max(peak_K, 0)
    sound = (broken == 0) & (peak > -float("inf")) & (peak < float("inf"))
    factor_K, mass_K, total, moment = relative_to(peak, peak_K, mass_K, moment_K, slope)
    edge, last, count = peak, row * 0 + NO_ID, row * 0 + 2
    if FILTERED:
        edge, last, mass_K, kept_moment, count = filtered(
            source, next_id, row, range_, (peak, slope), total, (tile_K, here_K, factor_K),
            (figures + LEVEL_MASS * plane, plane), memory, levels, options,
            DRAWN, TOP_K, TOP_P, MIN_P, PIECES, TILE // PIECES, TILES, QUEUE,
        )  # fmt: skip
        if DRAWN:
            total, moment = tl.sum(mass_K, 0), kept_moment
        else:
            count = row * 0 + 2
    measured = slope
    if TWO_LAWS:
        model_K = tl.load(figures + MODEL_MASS * plane + tile_K, mask=here_K, other=0.0)
        moment_K = tl.load(figures + MODEL_MOMENT * plane + tile_K, mask=here_K, other=0.0)
        measured = slope * 0.0 + LOG2E
        _, _, total, moment = relative_to(peak, peak_K, model_K, moment_K, measured)
    best = tl.min(tl.where(peak_K == peak, tile_K, TILES - 1), 0)
    x, column = tile_at(source, next_id, row, best, first, stop, TILE)
    lane, second = peak_and_second(x, best, peak, peak_K, TILES, TILE)
    token, logit = best * TILE + lane, peak
    if not GREEDY:
        seed, position, sample, step = stream
        winner, pick = reservoir(mass_K, seed, position, sample, step, TILES)
        x, column = tile_at(source, next_id, row, winner, first, stop, TILE)
        lane = inside(x, column, slope, edge, last, pick, FILTERED, TILE)
        token = winner * TILE + lane
        logit = tl.sum(tl.where(tl.arange(0, TILE) == lane, x, 0.0), 0)
    nats = measured.to(tl.float64) * LN2
    log_total = tl.log(total)
    other = tl.where(count > 1, tl.exp((second - peak).to(tl.float64) * nats), 0.0)
    log_prob = (logit - peak).to(tl.float64) * nats - log_total
    return sound, token, log_prob, log_total - moment * LN2 / total, (1.0 - other) / total


@triton.jit
def source_of(logits, stride, unconditional, other_stride, scale, scale_stride, far):
    """What `logits_at` reads of row `far`, int64: both branches and the scale of the row."""
    source = (logits, stride, unconditional, other_stride, scale)
    if scale is not None:
        # One element instead of a scalar, whose comparison the interpreter does not widen.
        s = tl.load(scale + far * scale_stride + tl.arange(0, 1)).to(tl.float32)
        source = (logits, stride, unconditional, other_stride, s)
    return source


@triton.jit
def write_row(tokens, figures, row, rows, next_id, first, found):
    """Write what `finish_row` found; the lowest permitted id and NaN for a row without a law."""
    sound, token, log_prob, entropy, margin = found
    lowest = first
    if next_id is not None:
        lowest = tl.load(next_id + first)
    far, nan = row.to(tl.int64), float("nan")
    tl.store(tokens + row, tl.where(sound, token, lowest).to(tl.int64))
    tl.store(figures + far, tl.where(sound, log_prob, nan).to(tl.float32))
    tl.store(figures + rows + far, tl.where(sound, entropy, nan).to(tl.float32))
    tl.store(figures + 2 * rows + far, tl.where(sound, margin, nan).to(tl.float32))


@triton.jit(
    do_not_specialize=["rows", "vocab", "tiles", "run", "top_k", "span_stride", "scale_stride"]
)
def draw_kernel(
    logits, stride, unconditional, other_stride, scale,
    scale_stride, span, span_stride, next_id, holds_forbidden,
    seed, seed_stride, position, position_stride, sample,
    sample_stride, step, step_stride, tokens, figures, scratch,
    maxima, listed, value, column, levels,
    rows, vocab, tiles, run, top_k, slope, heat, top_p, left_out, tail, floor,
    READ: tl.constexpr, FINISH: tl.constexpr, GREEDY: tl.constexpr, DRAWN: tl.constexpr,
    TWO_LAWS: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    TILES: tl.constexpr, PIECES: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    QUEUE: tl.constexpr, SAMPLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Read the tiles of row program_id(0) in run program_id(1), finish the row, or both.

    `tokens` (N,) int64; `figures` (3, N) float32: log-probability, entropy and margin, nats.
    `scratch` (planes, N, tiles) float32. For filters, else None: `maxima` float32 and `listed`
    int32 (N, tiles * PIECES), `value` float32 and `column` int32 (N, V); for top_p without top_k
    `levels` (N, LEVELS) float32. All addresses of a row are 64-bit.
    """
    row = tl.program_id(0)
    far = row.to(tl.int64)
    source = source_of(logits, stride, unconditional, other_stride, scale, scale_stride, far)
    first, stop = bounds(span, span_stride, row, vocab)
    begin, end = first // TILE, (stop + TILE - 1) // TILE
    scratch += far * tiles
    plane = far * 0 + rows
    plane *= tiles
    if maxima is not None:
        maxima += far * tiles * PIECES
        listed += far * tiles * PIECES
        value += far * vocab
        column += far * vocab
    if levels is not None:
        levels += far * LEVELS
    if READ:
        mine = tl.program_id(1) * run
        range_ = (tl.maximum(begin, mine), tl.minimum(end, mine + run), first, stop)
        if levels is not None:
            level_W = sample_levels(source, next_id, row, first, stop, slope, left_out, SAMPLE)
            # Every run of a row finds the same levels.
            tl.store(levels + tl.arange(0, LEVELS), level_W)
            tl.debug_barrier()
        read_tiles(
            source, (next_id, holds_forbidden), row, range_, scratch, plane,
            (maxima, scratch + LEVEL_MASS * plane, levels), slope,
            TWO_LAWS, PIECES, TILE, GROUP, STAGES,
        )  # fmt: skip
    if READ and FINISH:
        # What other threads of this program wrote is read now.
        tl.debug_barrier()
    if FINISH:
        stream = (
            tl.load(seed + far * seed_stride), tl.load(position + far * position_stride),
            tl.load(sample + far * sample_stride), tl.load(step + far * step_stride),
        )  # fmt: skip
        found = finish_row(
            source, next_id, row, (begin, end, first, stop), scratch, plane,
            (maxima, listed, value, column), levels, stream, slope,
            (top_k, top_p, tail, floor, heat),
            GREEDY, DRAWN, TWO_LAWS, TOP_K, TOP_P, MIN_P, TILES, PIECES, TILE, QUEUE,
        )  # fmt: skip
        write_row(tokens, figures, row, rows, next_id, first, found)
