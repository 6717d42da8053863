"""A kernel that writes the weights by which the draw in Triton picks inside each tile.

Imported by a test while the interpreter is asked for.
"""

import triton
import triton.language as tl

from mdiff.kernels.gpu.draw import tile_at, weights_inside
from mdiff.kernels.gpu.filters import NO_ID


@triton.jit
def weights_kernel(logits, weights, vocab, slope, TILE: tl.constexpr):
    """The weights (V,) float64 of tile program_id(0) of a row of logits (V,)."""
    tile = tl.program_id(0)
    source = (logits, 0, None, 0, None)
    x, column = tile_at(source, None, tile * 0, tile, 0, vocab, TILE)
    weight = weights_inside(x, column, slope, -float("inf"), NO_ID, False)
    tl.store(weights + column, weight, mask=column < vocab)
