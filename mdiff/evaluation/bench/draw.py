"""The draw timed against the baselines, each on the same logits."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from mdiff.evaluation.bench.laws import (
    AMUSED,
    DIFFUSERS,
    LLADA,
    MDLM,
    OURS,
    Case,
    Law,
    Side,
    failures,
    laws,
    make_case,
    sides,
)
from mdiff.evaluation.bench.timing import (
    Row,
    Size,
    cuda_seconds,
    interleaved,
    last_cache_bytes,
    ratios,
    times_faster,
)
from mdiff.ops import draw

# How many times faster at least, by backend and vocabulary.
TARGETS: Mapping[tuple[str, int], Mapping[str, float]] = {
    ("c", 50_257): {MDLM: 150, LLADA: 100, AMUSED: 60, DIFFUSERS: 60},
    ("torch", 50_257): {MDLM: 25, LLADA: 18, AMUSED: 11, DIFFUSERS: 11},
    ("c", 4096): {MDLM: 100, LLADA: 50, AMUSED: 45, DIFFUSERS: 45},
}
# Percent of the read bandwidth of one thread; the least rows of the buffer that is read.
READ_SHARE, PASS_ROWS, PASS_REPEATS = 60.0, 512, 5
GPU_TARGETS = {LLADA: 45.0, MDLM: 40.0}
GPU_VOCAB, GPU_REPEATS = 126_464, 10
BYTES = 4


def draw_rows(
    size: Size, found: Mapping[str, Side], checked: Mapping[str, Law], say: Callable[[str], None]
) -> Iterator[Row]:
    """The draw of each backend against each baseline, then the pass against reading alone."""
    others = [name for name in (MDLM, LLADA, AMUSED, DIFFUSERS) if name in found]
    backends = [name for name in OURS if name in found]
    for vocab, rows in ((size.vocab, size.rows), (size.small, size.small_rows)):
        case = make_case(rows, vocab, dtype=torch.float32)
        say(f"draw, V = {vocab:,}, {rows} rows")
        tasks = {name: partial(found[name], case) for name in backends + others}
        timings, hidden = interleaved(tasks, repeats=size.repeats), len(case.requested)
        for ours in backends:
            for other in others:
                yield times_faster(
                    "draw",
                    f"draw by {ours}, V = {vocab:,}, {hidden} rows, against {other}, {rows:,} rows",
                    timings[ours], timings[other], rows=(hidden, rows),
                    target=TARGETS.get((ours, vocab), {}).get(other),
                    note=failures(checked, ours, other),
                )  # fmt: skip
    say("draw, one pass against reading alone")
    yield from (pass_row(name, size) for name in backends[:1])


def pass_row(backend: str, size: Size) -> Row:
    """The bytes a second of the draw, with entropy and margin, over those of reading alone.

    Reading is the fastest of torch's sum, maximum and dot product over the same buffer, which is
    at least twice the last cache.
    """
    cache = last_cache_bytes()
    rows = max(PASS_ROWS, -(-2 * (cache or 0) // (BYTES * size.vocab)))
    logits_NV = make_case(rows, size.vocab, dtype=torch.float32).logits
    flat = logits_NV.flatten()
    readers: dict[str, Callable[[], object]] = {
        "sum": flat.sum, "amax": flat.amax, "dot": partial(torch.dot, flat, flat)
    }  # fmt: skip
    tasks = {"draw": lambda: draw(logits_NV, seed=1, backend=backend), **readers}
    # Cheap enough to repeat more often than the rest.
    timings = interleaved(tasks, repeats=PASS_REPEATS)
    reader = min(readers, key=lambda name: min(timings[name]))
    ours, read = timings["draw"], timings[reader]
    return Row(
        "draw", f"draw by {backend}, V = {size.vocab:,}: share of the read bandwidth",
        *ratios(read, ours, 100), unit="%", target=READ_SHARE,
        detail={
            "mdiff": {"seconds": ours, "rows": rows}, "read_by": reader,
            "other": {"seconds": read, "rows": rows}, "buffer_bytes": BYTES * flat.numel(),
            "last_cache_bytes": cache, "read_bytes_per_second": BYTES * flat.numel() / min(read),
        },
    )  # fmt: skip


def gpu_rows(
    size: Size, say: Callable[[str], None], *, device: str = "cuda", ours: str = "triton",
    vocab: int = GPU_VOCAB, seconds: Callable[[Callable[[], object]], float] = cuda_seconds,
) -> Iterator[Row]:  # fmt: skip
    """The draw on a GPU against LLaDA and MDLM, timed by CUDA events.

    All rows are hidden and both sides work on all of them; the logits, bfloat16, are larger than
    the second-level cache.
    """
    found, missing = sides(device, (ours,))
    if ours not in found:
        yield Row("draw", f"draw by {ours} on the GPU", note=f"not measured: {missing[0]}")
        return
    checked = laws({name: found[name] for name in (ours, LLADA, MDLM)}, device)
    say(f"draw on the GPU, V = {vocab:,}, {size.rows:,} rows")
    half = make_case(size.rows, vocab, device=device, dtype=torch.bfloat16)
    case = Case(half.logits, torch.full_like(half.tokens, half.mask_id), half.logits)
    tasks: dict[str, Callable[[], object]] = {
        # Without the write into the canvas, which is small only relative to the others.
        ours: lambda: draw(case.requested, seed=1, backend=ours),
        **{name: partial(found[name], case) for name in (LLADA, MDLM)},
    }
    try:
        timings = interleaved(tasks, repeats=GPU_REPEATS, seconds=seconds)
    except torch.cuda.OutOfMemoryError as error:
        yield Row("draw", "draw on the GPU", note=f"too little memory for the baselines: {error}")
        return
    for other in (LLADA, MDLM):
        yield times_faster(
            "draw", f"draw by {ours} on the GPU, V = {vocab:,}, bfloat16, against {other}",
            timings[ours], timings[other], rows=(size.rows, size.rows),
            target=GPU_TARGETS[other], note=failures(checked, ours, other),
        )  # fmt: skip
