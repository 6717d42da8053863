"""The kernel of `reveal_triton`: the positions of the highest scores, and their writing."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

# Positions that are counted at a time.
AT_ONCE = tl.constexpr(8192)


@triton.jit
def rows_before(requested, sample, length):
    """How many positions the samples before this one request: its first row of the draw."""
    stop = sample.to(tl.int64) * length
    count = sample * 0
    for start in range(0, stop, AT_ONCE):
        position = start + tl.arange(0, AT_ONCE)
        count += tl.sum(
            tl.load(requested + position, mask=position < stop, other=0).to(tl.int32), 0
        )
    return count


@triton.jit
def order_keys(score):
    """Unsigned keys that rise with the score; NaN and -inf count as the lowest finite number."""
    if score.dtype == tl.float64:
        score = tl.where(score > -1.7976931348623157e308, score, -1.7976931348623157e308)
        # Both zeros have one key.
        bits = tl.where(score == 0, 0.0, score).to(tl.int64, bitcast=True)
        flipped = (bits >> 63) | ((bits * 0 + 1) << 63)
        key = (bits ^ flipped).to(tl.uint64, bitcast=True)
    else:
        score = tl.where(score > -3.4028234663852886e38, score, -3.4028234663852886e38)
        bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
        flipped = (bits >> 31) | ((bits * 0 + 1) << 31)
        key = (bits ^ flipped).to(tl.uint32, bitcast=True)
    return score, key


@triton.jit
def highest(key, requested, count, BITS: tl.constexpr):
    """The positions of the `count` highest keys among those requested, ties to the first one."""
    # The largest threshold that `count` keys reach, from its first bit to its last.
    edge = (tl.sum(requested, 0) * 0).to(key.dtype)
    bit = (edge * 0 + 1) << (BITS - 1)
    for _ in range(0, BITS):
        reached = tl.sum((requested > 0) & (key >= (edge | bit)), 0)
        edge = tl.where(reached >= count, edge | bit, edge)
        bit = bit >> 1
    above = (requested > 0) & (key > edge)
    tie = (requested > 0) & (key == edge)
    wanted = count - tl.sum(above.to(tl.int32), 0)
    return above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= wanted))


@triton.jit(do_not_specialize=["length", "threshold_bits"])
def reveal_kernel(
    tokens, requested, drawn, drawn_log_prob, drawn_entropy, score, count, out_tokens, out_at,
    out_log_prob, out_entropy, length, threshold_bits,
    POSITIONS: tl.constexpr, BY_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Reveal one sample, program_id(0); `threshold_bits` are those of a float64."""
    sample = tl.program_id(0)
    position = tl.arange(0, POSITIONS)
    there = position < length
    at = sample.to(tl.int64) * length + position
    requests = tl.load(requested + at, mask=there, other=0).to(tl.int32)
    row = rows_before(requested, sample, length) + tl.cumsum(requests, 0) - 1
    drew = requests > 0
    known, key = order_keys(tl.load(score + row, mask=drew, other=0.0))
    chosen = highest(key, requests, tl.load(count + sample), key.dtype.primitive_bitwidth)
    if BY_THRESHOLD:
        least = threshold_bits.to(tl.int64).to(tl.float64, bitcast=True).to(known.dtype)
        chosen = chosen | (drew & (known >= least))
    old = tl.load(tokens + at, mask=there, other=0)
    tl.store(out_tokens + at, tl.load(drawn + row, mask=chosen, other=0), mask=chosen)
    tl.store(out_tokens + at, old, mask=there & (chosen == 0))
    tl.store(out_at + at, chosen, mask=there)
    for_log_prob = tl.load(drawn_log_prob + row, mask=chosen, other=0.0)
    for_entropy = tl.load(drawn_entropy + row, mask=chosen, other=0.0)
    tl.store(out_log_prob + at, for_log_prob, mask=there)
    tl.store(out_entropy + at, for_entropy, mask=there)
