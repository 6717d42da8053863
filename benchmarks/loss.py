"""The loss, forward and backward: chunked, and the plain paths that hold all logits.

    python benchmarks/loss.py [--rows 1024] [--width 256] [--vocab 50257] [--repeats 7]

Half of the rows are hidden, features and matrix are random, one thread. Our own re-creations of
two public sequences, over all rows as those are: `cross_entropy` (the head, .float(),
cross_entropy with ignore_index, as transformers' models do) and `log_softmax` (the head, minus
logsumexp, gather, times the mask, as MDLM does). `gathered` is cross_entropy on the hidden rows
alone, so that the effects of fewer rows and of chunks are separate.

Times are processor time of the calling thread, interleaved in one process. Memory is that of a
process of its own each: the high-water mark of resident memory (VmHWM, reset before the call)
above what is resident before it; it includes the gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import record
from torch import Tensor, nn

from mdiff.ops import masked_cross_entropy

# Features (N, D), the head, targets (N,), which rows are hidden (N,).
Problem = tuple[Tensor, nn.Linear, Tensor, Tensor]


def problem(
    rows: int, width: int, vocab: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Problem:
    """Random features and a random matrix whose logits have about unit variance."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocab, bias=False)
    with torch.no_grad():
        head.weight.normal_(std=width**-0.5, generator=generator)
    features = torch.randn(rows, width, generator=generator).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator).to(device)
    hidden = (torch.rand(rows, generator=generator) < 0.5).to(device)
    return features, head.to(device, dtype), targets, hidden


def chunked(features: Tensor, head: nn.Linear, targets: Tensor, hidden: Tensor) -> Tensor:
    """Ours: no more than a chunk's logits."""
    return masked_cross_entropy(features, head, targets, rows=hidden).value


def cross_entropy(features: Tensor, head: nn.Linear, targets: Tensor, hidden: Tensor) -> Tensor:
    """All logits, and a target that is ignored where nothing is hidden."""
    labels = targets.masked_fill(~hidden, -100)
    return F.cross_entropy(head(features).float(), labels, ignore_index=-100, reduction="sum")


def log_softmax(features: Tensor, head: nn.Linear, targets: Tensor, hidden: Tensor) -> Tensor:
    """All log-probabilities, gathered at the targets and masked."""
    logits = head(features)
    log_p = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return -(log_p.gather(-1, targets[:, None])[:, 0] * hidden).sum()


def gathered(features: Tensor, head: nn.Linear, targets: Tensor, hidden: Tensor) -> Tensor:
    """The logits of the hidden rows, all of them at once."""
    return F.cross_entropy(head(features[hidden]).float(), targets[hidden], reduction="sum")


WAYS: dict[str, Callable[..., Tensor]] = {
    way.__name__: way for way in (chunked, cross_entropy, log_softmax, gathered)
}


def gradients(name: str, given: Problem) -> tuple[Tensor, Tensor]:
    """The gradients of the features and of the matrix, by one forward and backward."""
    features, head = given[0], given[1]
    features.grad = head.weight.grad = None
    WAYS[name](*given).backward()
    if features.grad is None or head.weight.grad is None:
        raise RuntimeError(f"{name} left no gradient")
    return features.grad, head.weight.grad


def times(given: Problem, repeats: int) -> dict[str, list[float]]:
    """Seconds of processor time of each way, in turns, after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats + 1):
        for name in WAYS:
            begun = time.thread_time()
            gradients(name, given)
            seconds[name].append(time.thread_time() - begun)
    return {name: each[1:] for name, each in seconds.items()}


def errors(shape: tuple[int, int, int]) -> dict[str, list[float]]:
    """The relative error (2-norm) of each way's two gradients against ours in float64."""
    exact = gradients("chunked", problem(*shape, torch.float64))
    found = {}
    for name in WAYS:
        pairs = zip(gradients(name, problem(*shape)), exact)
        found[name] = [float((a - b).norm() / b.norm()) for a, b in pairs]
    return found


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def own_memory(name: str, shape: tuple[int, int, int]) -> int:
    """Bytes that one forward and backward add to this process at most."""
    # One of few columns first: libraries are read in and prepare their code.
    gradients(name, problem(shape[0], shape[1], 2000))
    given = problem(*shape)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    gradients(name, given)
    return resident("VmHWM") - before


def memory(name: str, shape: tuple[int, int, int]) -> int:
    """`own_memory` of a fresh process."""
    words = [sys.executable, __file__, "--memory-of", name]
    for option, value in zip(("--rows", "--width", "--vocab"), shape):
        words += [option, str(value)]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(json.loads(run.stdout))


def main() -> None:
    """Print and record times, memory and errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, default in (("rows", 1024), ("width", 256), ("vocab", 50_257), ("repeats", 7)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--memory-of", choices=WAYS, help="that alone, for this program's own use")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (options.rows, options.width, options.vocab)
    if options.memory_of:
        print(own_memory(options.memory_of, shape))
        return
    given = problem(*shape)
    seconds, wrong = times(given, options.repeats), errors(shape)
    figures: dict[str, Any] = {
        "rows": options.rows, "hidden": int(given[3].sum()), "width": options.width,
        "vocab": options.vocab, "repeats": options.repeats,
    }  # fmt: skip
    for name in WAYS:
        ratio = [theirs / ours for theirs, ours in zip(seconds[name], seconds["chunked"])]
        figures[name] = {
            "ms_minimum": 1e3 * min(seconds[name]),
            "ms_median": 1e3 * statistics.median(seconds[name]),
            "times_ours_minimum": min(seconds[name]) / min(seconds["chunked"]),
            "times_ours_median": statistics.median(ratio),
            "memory_mib": memory(name, shape) / 2**20,
            "error_features": wrong[name][0],
            "error_matrix": wrong[name][1],
        }
    for name in WAYS:
        row = figures[name]
        row["memory_times_ours"] = row["memory_mib"] / figures["chunked"]["memory_mib"]
        print(
            f"{name:14} {row['ms_minimum']:7.0f} ms at least, {row['ms_median']:7.0f} median "
            f"({row['times_ours_minimum']:.2f}x, {row['times_ours_median']:.2f}x); "
            f"{row['memory_mib']:6.0f} MiB ({row['memory_times_ours']:.1f}x); "
            f"errors {row['error_features']:.1e}, {row['error_matrix']:.1e}"
        )
    record("loss", figures)


if __name__ == "__main__":
    main()
