"""Draw, reveal and loss on a GPU: time, share of the copy bandwidth, ratios to baselines.

    python benchmarks/gpu.py [--rows 1024] [--vocab 126464] [--sweep]

Every time is the median of CUDA graphs (triton.testing.do_bench_cudagraph) whose calls go round
several inputs, together larger than the second-level cache; no launch is in it. The baselines are
our own re-creations of public operation sequences, on the same logits and all rows: LLaDA's
`generate` and MDLM's ancestral update, eager and by torch.compile, and a kernel with one random
number an element. The loss, forward and backward in bfloat16, is beside the logits of all rows
and cross_entropy (see loss.py), timed by events; its memory is what PyTorch allocated at most,
without the gradients and our float32 sums of them. `--sweep` tries other shapes of the draw's
kernel and records nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from loss import Problem, gradients, problem
from machine import record
from torch import Tensor

from mdiff.kernels import draw_triton as backend
from mdiff.kernels.draw_triton import draw_triton
from mdiff.kernels.reveal_triton import reveal_triton

# Bytes of inputs that are gone round: more than any second-level cache.
ROTATED = 1 << 30
# Columns that a program of the per-element race takes at a time: four words of one counter each.
RACE_LANES = 1024


def llada(logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """LLaDA's `add_gumbel_noise` in float64, argmax, and the probability by softmax and gather."""
    wide = logits.to(torch.float64)
    noise = (-torch.rand_like(wide).log()) ** temperature
    token = (wide.exp() / noise).argmax(-1)
    return token, logits.softmax(-1).gather(-1, token[:, None])[:, 0]


def mdlm(logits: Tensor, t: float = 1.0, dt: float = 1.0) -> Tensor:
    """MDLM's `_ddpm_update` in float64, the last id being the mask: at t = dt it draws a token."""
    wide = logits.to(torch.float64)
    wide[:, -1] += -1e6
    q = (wide - wide.logsumexp(-1, keepdim=True)).exp() * dt
    q[:, -1] = t - dt
    return (q / (1e-10 - (torch.rand_like(q) + 1e-10).log())).argmax(-1)


@triton.jit
def race_kernel(logits, stride, tokens, vocab, seed, LANES: tl.constexpr):
    """The id of one row by Gumbel noise in float32, one Philox word an element, one read."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    lane = tl.arange(0, LANES)
    best, token = row * 0.0 - float("inf"), row * 0
    for start in range(0, vocab, 4 * LANES):
        words = tl.randint4x(seed, row * (vocab // 4 + LANES) + start // 4 + lane)
        for part in tl.static_range(4):
            column = start + part * LANES + lane
            x = tl.load(logits + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
            u = (words[part].to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064e-10
            score = x - tl.log(-tl.log(tl.minimum(u, 0.99999994)))
            highest, at = tl.max(score, 0), tl.argmax(score, 0)
            token = tl.where(highest > best, start + part * LANES + at, token)
            best = tl.maximum(best, highest)
    tl.store(tokens + row, token.to(tl.int64))


def race(logits: Tensor, seed: int = 0) -> Tensor:
    """The race with noise an element, (N,) ids; no probability, entropy or margin."""
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    race_kernel[(len(logits),)](
        logits, logits.stride(0), tokens, logits.shape[1], seed, LANES=RACE_LANES
    )
    return tokens


def counters(rows: int, device: str) -> dict[str, Tensor]:
    """A random stream for each row."""
    zero = torch.zeros(rows, dtype=torch.int64, device=device)
    return {
        "seed": zero,
        "sample": zero,
        "step": zero,
        "position": torch.arange(rows, device=device),
    }


def inputs(rows: int, vocab: int, kind: torch.dtype, copies: int) -> list[Tensor]:
    """Normal logits of standard deviation 3."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (rows, vocab)
    return [
        (3 * torch.randn(shape, generator=generator, device="cuda")).to(kind) for _ in range(copies)
    ]


def micros(call: Callable[..., Any], *rounds: Sequence[Any]) -> float:
    """Median microseconds of a call that takes the next argument of each round every time."""
    turns = [itertools.cycle(arguments) for arguments in rounds]
    found = triton.testing.do_bench_cudagraph(
        lambda: call(*(next(turn) for turn in turns)), rep=50, return_mode="median"
    )
    return 1e3 * float(found)


def copy_bandwidth() -> float:
    """Bytes per microsecond that a copy of 1 GB reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").zero_()
    goal = torch.empty_like(source)
    return 2 * source.nbytes / micros(lambda: goal.copy_(source))


def draws(rows: int, vocab: int, speed: float) -> dict[str, Any]:
    """The draw under its options: microseconds, and share of the copy bandwidth."""
    counter = counters(rows, "cuda")
    scale = torch.full((rows,), 1.5, dtype=torch.float64, device="cuda")
    settings: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "plain": (torch.bfloat16, {}),
        "plain float32": (torch.float32, {}),
        "temperature 0.8": (torch.bfloat16, {"temperature": 0.8}),
        "guidance, temperature, min_p": (
            torch.bfloat16, {"temperature": 0.8, "min_p": 0.05, "scale": scale},
        ),
        "temperature, top_k 50": (torch.bfloat16, {"temperature": 0.8, "top_k": 50}),
        "top_p 0.9": (torch.bfloat16, {"top_p": 0.9}),
    }  # fmt: skip
    found = {}
    for name, (kind, options) in settings.items():
        nbytes = rows * vocab * kind.itemsize * (2 if "scale" in options else 1)
        copies = max(4, ROTATED // nbytes)
        tables = inputs(rows, vocab, kind, copies)
        others = tables[1:] + tables[:1] if "scale" in options else [None] * copies
        us = micros(
            lambda x, u, options=options: draw_triton(x, unconditional=u, **options, **counter),
            tables, others,
        )  # fmt: skip
        found[name] = {"us": us, "share_of_copy": nbytes / us / speed, "bytes": nbytes}
    plain = found["plain"]["us"] / found["plain"]["bytes"]
    for one in found.values():
        one["time_a_byte_over_plain"] = one["us"] / one["bytes"] / plain
    return found


def baselines(rows: int, vocab: int, ours: float) -> dict[str, Any]:
    """The other ways to draw from the same bfloat16 logits, and how much longer they take."""
    tables = inputs(rows, vocab, torch.bfloat16, 4)
    calls: dict[str, Callable[[Tensor], Any]] = {
        "LLaDA's operations, float64": llada,
        "MDLM's operations, float64": mdlm,
        "LLaDA's operations, torch.compile": torch.compile(llada),
        "MDLM's operations, torch.compile": torch.compile(mdlm),
        "a random number an element, one kernel": race,
    }
    found = {}
    for name, call in calls.items():
        us = micros(call, tables)
        found[name] = {"us": us, "over_ours": us / ours}
    return found


def block_step(vocab: int, rows: int = 32) -> dict[str, Any]:
    """Draw, confidence, choice and writing of a block of 32 positions, without synchronisation."""
    counter = counters(rows, "cuda")
    tables = inputs(rows, vocab, torch.bfloat16, max(4, ROTATED // (rows * vocab * 2)))
    tokens = torch.zeros((1, rows), dtype=torch.int64, device="cuda")
    asked = torch.ones((1, rows), dtype=torch.bool, device="cuda")
    count = torch.full((1,), 4, dtype=torch.int64, device="cuda")

    def step(logits: Tensor) -> None:
        drawn = draw_triton(logits, **counter)
        reveal_triton(tokens, asked, drawn, drawn.log_prob, count_B=count, threshold=-0.1)

    step(tables[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tables[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"us": micros(step, tables), "waits": 0, "rows": rows}


def memory(name: str, given: Problem, left_out: int) -> int:
    """Bytes that a forward and backward allocate at most, but for the gradients and `left_out`."""
    gradients(name, given)
    given[0].grad = given[1].weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = gradients(name, given)
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(each.nbytes for each in made) - left_out


def losses(rows: int = 32_768, width: int = 768, vocab: int = 50_257) -> dict[str, Any]:
    """The loss in chunks and the plain path: milliseconds and memory, and one over the other."""
    given = problem(rows, width, vocab, torch.bfloat16, "cuda")
    # Gradients are summed over chunks in float32 before they get the type of the parameters.
    sums = 4 * width * (vocab + int(given[3].sum()))
    found: dict[str, Any] = {"rows": rows, "width": width, "vocab": vocab}
    for name, left_out in (("chunked", sums), ("cross_entropy", 0)):
        used = memory(name, given, left_out)
        ms = triton.testing.do_bench(
            lambda name=name: gradients(name, given), warmup=100, rep=500, return_mode="median"
        )
        found[name] = {"ms": float(ms), "bytes": used}
    ours, plain = found["chunked"], found["cross_entropy"]
    found["times_faster"] = plain["ms"] / ours["ms"]
    found["memory_share"] = ours["bytes"] / plain["bytes"]
    return found


def verdicts(figures: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """(what, measured, goal, met) for each line of the table."""
    draw, other = figures["draw"], figures["baselines"]
    guided, kept = draw["guidance, temperature, min_p"], draw["temperature, top_k 50"]
    lines = [
        ("plain bfloat16, share of copy bandwidth", draw["plain"]["share_of_copy"], ">=", 0.85),
        (
            "plain float32, share of copy bandwidth",
            draw["plain float32"]["share_of_copy"],
            ">=",
            0.9,
        ),
        ("guidance + temperature + min_p, a byte", guided["time_a_byte_over_plain"], "<=", 1.1),
        ("temperature + top_k, a byte", kept["time_a_byte_over_plain"], "<=", 1.1),
        ("top_p, a byte", draw["top_p 0.9"]["time_a_byte_over_plain"], "<=", 1.6),
        ("block step of 32 rows, microseconds", figures["block step"]["us"], "<=", 12.0),
        ("loss over logits of all rows", figures["loss"]["times_faster"], ">=", 4.0),
        ("loss, share of their memory", figures["loss"]["memory_share"], "<=", 0.02),
    ]
    goals = dict(zip(other, (45.0, 40.0, 6.0, 6.0, 2.0)))
    lines += [(f"over {name}", other[name]["over_ours"], ">=", goals[name]) for name in other]
    return [
        (what, found, f"{sign} {goal:g}", found >= goal if sign == ">=" else found <= goal)
        for what, found, sign, goal in lines
    ]


def sweep(rows: int, vocab: int) -> None:
    """Print the plain draw's time for other shapes of the kernel, the fastest last."""
    tables = inputs(rows, vocab, torch.bfloat16, 4)
    counter = counters(rows, "cuda")
    names = ("GROUP", "STAGES", "WARPS", "REGISTERS", "PROGRAMS")
    found = []
    for shape in itertools.product((2, 4, 8), (2, 3, 4), (4, 8), (64, 128), (8, 32)):
        for name, value in zip(names, shape):
            setattr(backend, name, value)
        found.append((micros(lambda x: draw_triton(x, **counter), tables), shape))
    for us, shape in sorted(found, reverse=True):
        print(f"{us:8.1f} us  {dict(zip(names, shape))}")


def main() -> None:
    """Measure, print the table and write results/gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=126_464)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("a CUDA device is needed; none is here")
    if options.sweep:
        sweep(options.rows, options.vocab)
        return
    speed = copy_bandwidth()
    figures: dict[str, Any] = {
        "rows": options.rows, "vocab": options.vocab, "triton": triton.__version__,
        "copy_gb_per_s": speed / 1e3, "draw": draws(options.rows, options.vocab, speed),
    }  # fmt: skip
    ours = figures["draw"]["plain"]["us"]
    figures["baselines"] = baselines(options.rows, options.vocab, ours)
    figures["block step"] = block_step(options.vocab)
    figures["loss"] = losses()
    print(f"copy {speed / 1e3:.0f} GB/s; {options.rows} rows of {options.vocab}: {ours:.1f} us")
    for what, found, goal, met in verdicts(figures):
        print(f"{what:58s} {found:9.3f}  goal {goal:8s} {'met' if met else 'NOT met'}")
    record("gpu", figures)


if __name__ == "__main__":
    main()
