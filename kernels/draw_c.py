"""The draw in C: one read of each row, by the library that the package's build made of onepass.c.

The library is optional: an install without a compiler has none, and `WHY_NOT` says so.
"""

import ctypes
import math
import struct
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import mdiff.kernels
from mdiff.kernels.draw_torch import COLDEST, HOTTEST, draw_torch
from mdiff.kernels.reference import TILE, Draw, unit_stride

# The same number as in onepass.c: a library that was built from another file is refused.
ABI = 3
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# `struct request` of onepass.c, in its order and with C's alignment; P is a pointer.
REQUEST = struct.Struct("@ 2P5q Pq 4P4q Pq Pq P3P dq 2f 4i")


def load(folders: list[str]) -> tuple[ctypes.CDLL | None, str]:
    """The library from the first of `folders` that holds one, or None and the reason."""
    found = [path for folder in folders for path in sorted(Path(folder).glob("_onepass*.so"))]
    if not found:
        return None, "its library is not built (that takes a C compiler; pip hides a failure)"
    try:
        library = ctypes.CDLL(str(found[0]))
        built = library.onepass_abi()
    except (OSError, AttributeError) as error:
        return None, f"{found[0].name} does not load: {error}"
    if built != ABI:
        return None, f"{found[0].name} is of version {built}, not {ABI}: install again"
    library.onepass_draw.argtypes = [ctypes.c_char_p]
    library.onepass_draw.restype = ctypes.c_int32
    library.onepass_choose(1)
    return library, ""


LIBRARY, WHY_NOT = load(list(mdiff.kernels.__path__))


def by_torch(logits_NV: Tensor) -> str | None:
    """Why `draw_c` hands these logits over to `draw_torch`; None where it does not."""
    return None if logits_NV.dtype in FORMATS else f"{logits_NV.dtype} logits"


def draw_c(
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

    float32, bfloat16 and float16 logits on the CPU, float32 inside, sums of tiles in float64;
    rows run on up to torch.get_num_threads() threads. What `by_torch` names goes to
    `draw_torch`. Raises RuntimeError without the library, MemoryError without memory for tiles.
    """
    if by_torch(logits_NV) is not None:
        return draw_torch(
            logits_NV, seed=seed, sample=sample, step=step, position=position,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            forbidden=forbidden, span=span, measure=measure, unconditional=unconditional,
            scale=scale, tile=tile,
        )  # fmt: skip
    if LIBRARY is None or logits_NV.device.type != "cpu":
        raise RuntimeError(WHY_NOT or f"draw_c takes CPU tensors, not {logits_NV.device}")
    rows, vocab = logits_NV.shape
    logits_NV, unconditional = unit_stride(logits_NV), unit_stride(unconditional)
    span = unit_stride(span)
    columns = _columns(forbidden) if forbidden else None
    # C writes here: int64 and float32 on the CPU, whatever the process's defaults are.
    tokens = torch.empty(rows, dtype=torch.int64, device="cpu")
    figures = torch.empty(3, rows, dtype=torch.float32, device="cpu")
    log_prob, entropy, margin = figures.unbind()
    counter = (seed, sample, step, position)
    request = REQUEST.pack(
        logits_NV.data_ptr(), 0 if unconditional is None else unconditional.data_ptr(),
        logits_NV.stride(0), 0 if unconditional is None else unconditional.stride(0),
        rows, vocab, min(tile, vocab),
        *((0, 0) if scale is None else (scale.data_ptr(), scale.stride(0))),
        *(part.data_ptr() for part in counter), *(part.stride(0) for part in counter),
        0 if columns is None else columns.data_ptr(), len(forbidden),
        *((0, 0) if span is None else (span.data_ptr(), span.stride(0))),
        tokens.data_ptr(), log_prob.data_ptr(), entropy.data_ptr(), margin.data_ptr(),
        1.0 if top_p is None else top_p, 0 if top_k is None or top_k >= vocab else top_k,
        1 / min(max(temperature, COLDEST), HOTTEST) if temperature > 0 else 1.0,
        math.log(min_p) if min_p else -math.inf,
        FORMATS[logits_NV.dtype], temperature == 0, measure == "drawn", torch.get_num_threads(),
    )  # fmt: skip
    if LIBRARY.onepass_draw(request) != 0:
        raise MemoryError("no memory for a tile of logits a thread")
    return Draw(tokens, log_prob, entropy, margin)


@lru_cache(maxsize=16)
def _columns(forbidden: tuple[int, ...]) -> Tensor:
    return torch.tensor(forbidden, dtype=torch.int64, device="cpu")
