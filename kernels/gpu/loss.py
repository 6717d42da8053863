"""The loss's kernel in Triton: one program a row, the loss in one read, the gradient in another.

A row is read in blocks of columns: each lane keeps its own sum of exp(x - peak), all rescaled
when the row's largest logit so far rises (Milakov & Gimelshein 2018).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

from mdiff.kernels.gpu.tiles import bounds

# Blocks that are loaded ahead.
STAGES = tl.constexpr(3)


@triton.jit
def block_at(logits, next_id, range_, start, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Logits of a block, float32, -inf where not permitted; columns; which are permitted.

    WHOLE where all columns are in the row and in its span: their loads are wide.
    """
    first, stop = range_
    column = start + tl.arange(0, BLOCK)
    if WHOLE:
        x = tl.load(logits + column).to(tl.float32)
        ok = column >= 0
    else:
        ok = (column >= first) & (column < stop)
        x = tl.load(logits + column, mask=ok, other=0.0).to(tl.float32)
    if next_id is not None:
        ok = ok & (tl.load(next_id + column, mask=ok, other=-1) == column)
    return tl.where(ok, x, -float("inf")), column, ok


@triton.jit
def with_block(sums, logits, next_id, range_, origin, start,
               WHOLE: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The sums of `row_sums` with one block more."""
    peak, total, number, away = sums
    x, _, ok = block_at(logits, next_id, range_, start, WHOLE, BLOCK)
    higher = tl.maximum(peak, tl.max(x, 0))
    # Before the first finite logit nothing is summed up, and -inf - -inf has no value.
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * tl.exp(peak - shift) + tl.exp(x - shift)
    if SMOOTHED:
        away += tl.where(ok, x - origin, 0.0)
        number += ok.to(tl.int32)
    return higher, total, number, away


@triton.jit
def row_sums(logits, next_id, range_, whole, origin,
             SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Largest logit; sum of exp(x - largest); number of ids and sum of x - origin, if SMOOTHED."""
    first, stop = range_
    lane = tl.arange(0, BLOCK)
    sums = (origin * 0.0 - float("inf"), lane * 0.0, lane * 0, lane * 0.0)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        sums = with_block(sums, logits, next_id, range_, origin, start, True, SMOOTHED, BLOCK)
    for start in range(tl.maximum(first // BLOCK * BLOCK, whole), stop, BLOCK):
        sums = with_block(sums, logits, next_id, range_, origin, start, False, SMOOTHED, BLOCK)
    peak, total, number, away = sums
    return peak, tl.sum(total, 0), tl.sum(number, 0), tl.sum(away, 0)


@triton.jit
def differentiate(logits, next_id, range_, start, goal, sums, shares,
                  WHOLE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of one block, not yet by the row's weight, and its columns."""
    peak, total = sums
    smoothing, share = shares
    x, column, ok = block_at(logits, next_id, range_, start, WHOLE, BLOCK)
    slope = tl.exp(x - peak) / total - share - tl.where(column == goal, 1 - smoothing, 0.0)
    return tl.where(ok, slope, 0.0), column


@triton.jit(do_not_specialize=["rows", "columns"])
def loss_kernel(
    logits, stride, target, weight, next_id, span, found, rows, columns, smoothing,
    DIFFERENTIATE: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of row program_id(0), and weight times their gradient over its logits (N, V).

    `target` (N,) int64, `weight` (N,) float32, `found` (2, N) float32: -log p(target) and with
    a the smoothing (1 - a) (-log p(target)) + a times the mean of -log p, nats. `span` (N, 2)
    int64 and `next_id` (V + 1,) int32, see `draw_triton.forbidden_map`, or None.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    range_ = bounds(span, 2, row, columns)
    goal = tl.load(target + row)
    is_there = (goal >= range_[0]) & (goal < range_[1])
    aim = tl.load(logits + goal, mask=is_there, other=-float("inf")).to(tl.float32)
    if next_id is not None:
        barred = tl.load(next_id + goal, mask=is_there, other=0) != goal
        aim = tl.where(barred, -float("inf"), aim)
    origin = tl.where(tl.abs(aim) < float("inf"), aim, 0.0)
    # Whole blocks of a row whose span is all of it.
    everywhere = (range_[0] == 0) & (range_[1] == columns)
    whole = tl.where(everywhere, columns // BLOCK * BLOCK, 0)
    peak, total, number, away = row_sums(
        logits, next_id, range_, whole, origin, SMOOTHED, BLOCK
    )  # fmt: skip
    log_total = tl.log(total)
    nll = log_total - (aim - peak)
    smooth = nll
    if SMOOTHED:
        spread = log_total - (away / number + (origin - peak))
        smooth = (1 - smoothing) * nll + smoothing * spread
    tl.store(found + row, nll)
    tl.store(found + rows + row, smooth)
    if DIFFERENTIATE:
        scale = tl.load(weight + row)
        share = scale * 0.0
        if SMOOTHED:
            share = smoothing / number
        sums, shares = (peak, total), (smoothing, share)
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            slope, column = differentiate(
                logits, next_id, range_, start, goal, sums, shares, True, BLOCK
            )
            tl.store(logits + column, scale * slope)
        for start in range(whole, columns, BLOCK):
            slope, column = differentiate(
                logits, next_id, range_, start, goal, sums, shares, False, BLOCK
            )
            tl.store(logits + column, scale * slope, mask=column < columns)
