"""The draw in Triton: one read of each row of logits on a GPU, or in Triton's interpreter.

Triton is imported on the first draw, so that a machine that draws otherwise does not wait for it.
"""

import math
import os
import sys
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mdiff.kernels.draw_torch import COLDEST, HOTTEST, draw_torch
from mdiff.kernels.reference import TILE, Draw, unit_stride

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
# The most ids that top_k keeps here.
MOST_KEPT = 64
# A tile has this many pieces, whose largest logits say which of them the filters look at again.
PIECES = 8
# Tiles of one iteration; half of it where each is weighed twice or comes from two branches.
GROUP = 4
# Iterations that are loaded ahead, and warps of a program without and with filters.
STAGES, WARPS, FILTER_WARPS = 3, 4, 8
# Registers of a thread without and with filters: a multiprocessor holds eight programs of 128
# threads or three of 256, and by ptxas no more than a few bytes of them are put aside.
REGISTERS, FILTER_REGISTERS = 64, 80
# Pieces that the filters look at together, at a tile of 1,024: 1,024 logits.
QUEUE = 8
# One in so many columns of a row is in each half of the sample of top_p; bounds of a half.
SAMPLED, LEAST_SAMPLED, MOST_SAMPLED = 64, 16, 1024
# Bytes of the lists of ids that the filters make: rows with more are drawn in turns.
LIST_BYTES = 1 << 30
# Planes of a tile's figures: those of tiles_triton, without and with a second law and levels.
ONE_LAW, TWO_LAWS, WITH_LEVELS, LEVELS = 3, 5, 9, 4
# Programs that keep a multiprocessor busy: rows are split until there are so many of each.
PROGRAMS = 8
LOWEST = -3e38


def why_not(device_type: str) -> str:
    """Why `draw_triton` cannot run on a type of device; "" where it can.

    It runs on "cuda", and on "cpu" in Triton's interpreter, for which TRITON_INTERPRET=1 must
    be set before Triton is imported.
    """
    if find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda":
        return "" if not _interprets() else "TRITON_INTERPRET=1 is set, for tensors on the CPU"
    if device_type != "cpu":
        return f"it runs on cuda, not on {device_type}"
    if _interprets():
        return ""
    return "it runs on the CPU only with TRITON_INTERPRET=1 set before triton is imported"


def _interprets() -> bool:
    """Whether kernels run in the interpreter, without importing Triton to find out."""
    if "triton" not in sys.modules:
        return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes", "y")
    import triton

    return not isinstance(triton.language.sum, triton.JITFunction)


def by_torch(logits_NV: Tensor, top_k: int | None = None) -> str | None:
    """Why `draw_triton` hands these logits and options over to `draw_torch`; None if not."""
    if top_k is not None and MOST_KEPT < top_k < logits_NV.shape[1]:
        return f"top_k above {MOST_KEPT}"
    return None if logits_NV.dtype in FORMATS else f"{logits_NV.dtype} logits"


def draw_triton(
    logits_NV: Tensor,
    *,
    seed: Tensor,
    sample: Tensor,
    step: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    forbidden: tuple[int, ...] = (),
    span: Tensor | None = None,
    measure: str = "model",
    unconditional: Tensor | None = None,
    scale: Tensor | None = None,
    tile: int = TILE,
) -> Draw:
    """One id a row and its figures; arguments and law as `reference.draw_reference`.

    float32, bfloat16 and float16 logits, float32 inside, masses of tiles added in float64; what
    `by_torch` names goes to `draw_torch`. Every logit is read once; looked at again are the tile
    of the maximum, the tile that wins and, with a filter, once, the pieces of the row that reach
    its bound: few for top_k and min_p, and at most all of them for top_p. The rest is done on a
    list of ids. `tile` is a power of two. Nothing waits for the device.

    Raises RuntimeError where `why_not` has a reason, ValueError for another tile.
    """
    if by_torch(logits_NV, top_k) is not None:
        return draw_torch(
            logits_NV, seed=seed, sample=sample, step=step, position=position,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, forbidden=forbidden,
            span=span, measure=measure, unconditional=unconditional, scale=scale, tile=tile,
        )  # fmt: skip
    reason = why_not(logits_NV.device.type)
    if reason:
        raise RuntimeError(reason)
    if tile < 1 or tile & (tile - 1):
        raise ValueError(f"tile={tile}: need a power of two")
    of_rows = [seed, position, sample, step, unit_stride(span), unit_stride(unconditional), scale]
    device, drawn = logits_NV.device, []
    for part in _turns(logits_NV, any(each is not None for each in (top_k, top_p, min_p))):
        logits = logits_NV[part]
        tokens = torch.empty(len(logits), dtype=torch.int64, device=device)
        figures = torch.empty((3, len(logits)), dtype=torch.float32, device=device)
        if len(logits):
            with torch.cuda.device(logits.get_device()):
                _launch(
                    unit_stride(logits), tokens, figures, tile,
                    [None if each is None else each[part] for each in of_rows],
                    (temperature, top_k, top_p, min_p), forbidden, measure == "drawn",
                )  # fmt: skip
        drawn.append(Draw(tokens, *figures.unbind()))
    return drawn[0] if len(drawn) == 1 else Draw(*(torch.cat(field) for field in zip(*drawn)))


def _turns(logits_NV: Tensor, filters: bool) -> list[slice]:
    """The rows that are drawn at once: all of them, or as many as have room for their lists."""
    rows, vocab = logits_NV.shape
    most = max(1, LIST_BYTES // max(8 * vocab, 1)) if filters else max(1, rows)
    return [slice(first, first + most) for first in range(0, max(1, rows), most)]


def _launch(
    logits_NV: Tensor,
    tokens: Tensor,
    figures: Tensor,
    tile: int,
    of_rows: list[Tensor | None],
    options: tuple[float, int | None, float | None, float | None],
    forbidden: tuple[int, ...],
    drawn: bool,
) -> None:
    """Start the kernel, once where every row is one program, else once for each of its parts.

    `of_rows`: seed, position, sample, step, span, unconditional and scale.
    """
    from mdiff.kernels.gpu.draw import draw_kernel

    rows, vocab = logits_NV.shape
    device, (temperature, top_k, top_p, min_p) = logits_NV.device, options
    *counter, span, unconditional, scale = of_rows
    heat = min(max(temperature, COLDEST), HOTTEST) if temperature > 0 else 1.0
    use = {
        "TOP_K": top_k is not None and top_k < vocab,
        "TOP_P": top_p is not None and top_p < 1,
        "MIN_P": min_p is not None and min_p > 0,
    }
    two_laws = heat != 1 and not drawn
    tiles = -(-vocab // tile)
    pieces = min(PIECES, tile)
    filters, levels = any(use.values()), use["TOP_P"] and not use["TOP_K"]
    planes = WITH_LEVELS if levels else TWO_LAWS if two_laws else ONE_LAW
    next_id, holds = forbidden_map(forbidden, vocab, tile, device)
    group = GROUP // 2 if two_laws or scale is not None else GROUP
    run, runs = _runs(rows, tiles, group, device)
    arguments = (
        logits_NV, logits_NV.stride(0), *_with_stride(unconditional), *_with_stride(scale),
        *_with_stride(span), next_id, holds, *(part for c in counter for part in _with_stride(c)),
        tokens, figures, torch.empty((planes, rows, tiles), dtype=torch.float32, device=device),
        *_lists(rows, vocab, tiles * pieces if filters else 0, levels, device),
        rows, vocab, tiles, run, top_k or 0, *_numbers(vocab, heat, top_p, min_p),
    )  # fmt: skip
    settings = {
        **use, "GREEDY": temperature == 0, "DRAWN": drawn, "TWO_LAWS": two_laws,
        "TILES": _power_of_two(tiles), "PIECES": pieces, "TILE": tile, "GROUP": group,
        "QUEUE": QUEUE, "SAMPLE": _sample(vocab), "STAGES": STAGES,
        "num_warps": FILTER_WARPS if filters else WARPS,
        "maxnreg": FILTER_REGISTERS if filters else REGISTERS,
    }  # fmt: skip
    if runs == 1:
        draw_kernel[(rows, 1)](*arguments, READ=True, FINISH=True, **settings)
    else:
        draw_kernel[(rows, runs)](*arguments, READ=True, FINISH=False, **settings)
        draw_kernel[(rows, 1)](*arguments, READ=False, FINISH=True, **settings)


def _numbers(
    vocab: int, heat: float, top_p: float | None, min_p: float | None
) -> tuple[float, ...]:
    """slope, heat, top_p, what it leaves out, and the bounds below which no filter keeps an id."""
    left_out = 1 - top_p if top_p is not None and top_p < 1 else 1.0
    tail = max(heat * math.log(left_out / vocab), LOWEST)
    floor = max(heat * math.log(min_p), LOWEST) if min_p else 0.0
    return math.log2(math.e) / heat, heat, top_p or 1.0, left_out, tail, floor


def _with_stride(table: Tensor | None) -> tuple[Tensor | None, int]:
    return table, 0 if table is None else table.stride(0)


def _lists(
    rows: int, vocab: int, pieces: int, levels: bool, device: torch.device
) -> list[Tensor | None]:
    """What the filters note: maxima of pieces, a list of pieces, one of ids, and the levels."""
    if not pieces:
        return [None] * 5
    lists: list[Tensor | None] = [
        torch.empty((rows, columns), dtype=kind, device=device)
        for columns in (pieces, vocab)
        for kind in (torch.float32, torch.int32)
    ]
    shape = (rows, LEVELS)
    return [*lists, torch.empty(shape, dtype=torch.float32, device=device) if levels else None]


def _sample(vocab: int) -> int:
    """The columns in each half of the sample of a row, a power of two."""
    return min(max(_power_of_two(vocab // SAMPLED + 1) // 2, LEAST_SAMPLED), MOST_SAMPLED)


def _runs(rows: int, tiles: int, group: int, device: torch.device) -> tuple[int, int]:
    """Tiles that one program reads, whole groups, and programs a row."""
    wanted = PROGRAMS * _multiprocessors(device)
    groups = -(-tiles // group)
    run = group * -(-groups // min(groups, max(1, wanted // rows)))
    return run, -(-tiles // run)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def forbidden_map(
    forbidden: tuple[int, ...], vocab: int, tile: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The lowest permitted id from each id on, (V + 1,) int32, and which tiles hold forbidden ones.

    Made on the device, so that nothing waits for it; None and None where nothing is forbidden.
    """
    if not forbidden:
        return None, None
    next_id = torch.arange(vocab + 1, dtype=torch.int32, device=device)
    holds = torch.zeros(-(-vocab // tile), dtype=torch.int32, device=device)
    for column in sorted(forbidden, reverse=True):
        next_id[column] = next_id[column + 1]
        holds[column // tile] = 1
    return next_id, holds


def _power_of_two(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
