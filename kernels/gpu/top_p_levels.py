"""Levels around the edge of top_p, in Triton, from a sample of the row before it is read.

The mass below a logit is a sum of small weights, which a sample knows well; the whole mass hangs
on a few large ones, which it may miss. So there are several levels, by the standard errors of
both. READ adds up the mass from each level on, exactly, and the edge lies between two of them
whatever the sample was: a poor one makes the list of the ids between them longer, no more.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Arguments of a Triton kernel have no Python types: Triton reads annotations as its own.

import triton
import triton.language as tl

from mdiff.kernels.gpu.tiles import LEVELS, logits_at, permitted_at

# Columns of the sample that lie side by side: what memory hands over at once.
RUN = tl.constexpr(16)
# A prime, so that runs do not keep step with a vocabulary that has a period.
JUMP = tl.constexpr(613)
# The sample is counted in bins of 1/8 bit of weight down from its largest; the last is no weight.
BINS = tl.constexpr(256)
BINS_A_BIT = tl.constexpr(8)


@triton.jit
def spread_columns(first, stop, SAMPLE: tl.constexpr):
    """Columns of runs that lie evenly from `first` up to `stop`, each somewhere in its share."""
    lane = tl.arange(0, SAMPLE)
    run = lane // RUN
    share = (stop - first) * RUN // SAMPLE
    aside = run * JUMP % tl.maximum(share - RUN + 1, 1)
    column = first + run * (stop - first) // (SAMPLE // RUN) + aside + lane % RUN
    return tl.minimum(column, stop - 1)


@triton.jit
def counted(x, top, slope):
    """How many logits lie in each bin below `top`."""
    depth = tl.maximum((top - x) * (slope * BINS_A_BIT), 0.0)
    return tl.histogram(tl.where(depth < BINS - 1, depth, BINS - 1).to(tl.int32), BINS)


@triton.jit
def sample_levels(source, next_id, row, first, stop, slope, left_out,
                  SAMPLE: tl.constexpr):  # fmt: skip
    """LEVELS rising logits about that from which on all but `left_out` of the mass lies.

    The first SAMPLE ids, where vocabularies have their frequent ones, and SAMPLE of the others.
    With T the sample's mass below a level, S all of it and k = -3, -1, 1, 3 standard errors of
    each, a level is the highest at which T - k errors is at most left_out S exp(k errors).
    """
    head = first + tl.arange(0, SAMPLE)
    others = first + SAMPLE
    tail = spread_columns(others, stop, SAMPLE)
    ok = head < stop
    x = permitted_at(logits_at(source, row, head, ok), next_id, head, ok)
    ok = tail >= others
    rest = permitted_at(logits_at(source, row, tail, ok), next_id, tail, ok)
    top = tl.maximum(tl.max(x, 0), tl.max(rest, 0))
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    each = (stop - others) / SAMPLE
    bin_B = tl.arange(0, BINS)
    weight_B = tl.where(bin_B < BINS - 1, tl.exp2(-(bin_B + 0.5) / BINS_A_BIT), 0.0)
    spread_B = counted(rest, top, slope) * each * weight_B
    mass_B = counted(x, top, slope) * weight_B + spread_B
    square_B = spread_B * each * weight_B
    below_B = tl.cumsum(mass_B, 0, reverse=True)
    error_B = tl.sqrt(tl.cumsum(square_B, 0, reverse=True))
    total = tl.maximum(tl.sum(mass_B, 0), 1e-30)
    k_W = 2.0 * tl.arange(0, LEVELS) - (LEVELS - 1)
    goal_W = left_out * total * tl.exp(k_W * (tl.sqrt(tl.sum(square_B, 0)) / total))
    beyond_WB = below_B[None, :] - k_W[:, None] * error_B[None, :] > goal_W[:, None]
    return top - tl.sum(beyond_WB.to(tl.int32), 1) / (slope * BINS_A_BIT)


@triton.jit
def bracket(figures, plane, levels, tile_K, here_K, factor_K, target, low):
    """The logits from `low` up to `high` among which the edge of a mass lies, exactly.

    And the mass of each tile from `high` on, relative to the row's peak, float64.
    """
    high = low * 0.0 + float("inf")
    above_K = factor_K * 0.0
    for j in tl.static_range(LEVELS):
        level = tl.load(levels + (LEVELS - 1 - j))
        at = figures + (LEVELS - 1 - j) * plane + tile_K
        mass_K = tl.load(at, mask=here_K, other=0.0).to(tl.float64) * factor_K
        reached = tl.sum(mass_K, 0) >= target
        low = tl.where(reached, tl.maximum(low, level), low)
        above_K = tl.where(reached, above_K, mass_K)
        high = tl.where(reached, high, level)
    # Where the floor of another filter lies higher, all that it keeps is looked at.
    inverted = low >= high
    return low, tl.where(inverted, float("inf"), high), tl.where(inverted, 0.0, above_K)
