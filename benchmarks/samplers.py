"""First hitting against ancestral sampling at 1,000 steps, same law, same model.

    python benchmarks/samplers.py [MODEL] [--length 256] [--repeats 3]

Calls are counted, seconds taken in turn in one process. "every step" calls the model at each
of the 1,000 steps, as published samplers without a cache do; "when needed" is our ancestral,
which calls it only where something is revealed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from machine import record

from mdiff.find import find
from mdiff.pipeline.loading import load
from mdiff.tokens import hidden_canvas

STEPS = 1000
RUNS = {
    "first hitting": ("first_hitting", {}),
    "ancestral, every step": ("ancestral", {"steps": STEPS, "idle_calls": True}),
    "ancestral, when needed": ("ancestral", {"steps": STEPS}),
}


def main() -> None:
    """Print and record seconds, calls and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="builtin:shakespeare")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    pipeline = load(options.model)
    canvas = hidden_canvas(1, options.length, space=pipeline.space)
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    calls: dict[str, list[int]] = {name: [] for name in RUNS}
    with torch.inference_mode():
        pipeline.denoiser(canvas, at=canvas == pipeline.space.mask_id)
        for repeat in range(options.repeats):
            for name, (sampler, extra) in RUNS.items():
                begun = time.perf_counter()
                *_, last = find("samplers", sampler)(
                    pipeline.denoiser, canvas, space=pipeline.space, seed=repeat, **extra
                )
                seconds[name].append(time.perf_counter() - begun)
                calls[name].append(int(last.calls))
    base = statistics.median(seconds["first hitting"])
    for name in RUNS:
        median = statistics.median(seconds[name])
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"{name:24} {median:7.2f} s ({spread})  {median / base:5.2f}x  calls {calls[name]}")
    length = options.length
    expected = STEPS * (1 - (1 - 1 / STEPS) ** length)
    miss = 1 - 1 / STEPS
    variance = STEPS * miss**length + STEPS * (STEPS - 1) * (1 - 2 / STEPS) ** length
    variance -= (STEPS * miss**length) ** 2
    needed = statistics.mean(calls["ancestral, when needed"])
    sigma = math.sqrt(variance / options.repeats)
    print(f"calls when needed: mean {needed:.1f}, expected {expected:.1f} +- {sigma:.1f}")
    record("samplers", {
        "model": options.model, "length": length, "steps": STEPS, "seconds": seconds,
        "calls": calls, "expected_calls_when_needed": expected, "sigma_of_mean": sigma,
        "ratio_every_step": statistics.median(seconds["ancestral, every step"]) / base,
    })  # fmt: skip


if __name__ == "__main__":
    main()
