"""Toolkit time outside the model: first hitting, V = 50,257, L = 256.

    python benchmarks/overhead.py [--length 256] [--vocab 50257] [--samples 1]

The backbone has the shape of builtin:shakespeare with a vocabulary of its own; its calls are
timed from inside, everything else of a step is the toolkit's. Beside the clock, the processor
time of the calling thread: on a busy machine the clock counts the waits of both.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from machine import record

from mdiff.evaluation.bench.generation import step_seconds
from mdiff.ops import backend_name


def main() -> None:
    """Print and record the share of a step outside the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    steps = step_seconds(vocab=options.vocab, length=options.length, samples=options.samples)
    figures: dict[str, Any] = {"backend": backend_name(), **vars(options)}
    for clock, name in (("clock", ""), ("thread", "_processor")):
        whole, inside = steps[clock]
        outside = statistics.median(w - i for w, i in zip(whole, inside))
        figures[f"step{name}_ms"] = 1e3 * statistics.median(whole)
        figures[f"model{name}_ms"] = 1e3 * statistics.median(inside)
        figures[f"outside{name}_ms"] = 1e3 * outside
        figures[f"share_of_step{name}"] = outside / statistics.median(whole)
        print(
            f"{clock}: step {figures[f'step{name}_ms']:.2f} ms, "
            f"model {figures[f'model{name}_ms']:.2f} ms, outside {1e3 * outside:.3f} ms: "
            f"{100 * figures[f'share_of_step{name}']:.1f} percent of a step"
        )
    print(f"{torch.get_num_threads()} threads, backend {figures['backend']}")
    record("overhead", figures)


if __name__ == "__main__":
    main()
