"""Toolkit time outside the model: first hitting, V = 50,257, L = 256.

    python benchmarks/overhead.py [--length 256] [--vocab 50257] [--samples 1]

The backbone has the shape of builtin:shakespeare with a vocabulary of its own; its calls are
timed from inside, everything else of a step is the toolkit's. Beside the clock, the processor
time of the calling thread: on a busy machine the clock counts the waits of both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from machine import record
from torch import Tensor

from mdiff.backbones.transformer import transformer
from mdiff.ops import backend_name
from mdiff.samplers.first_hitting import first_hitting
from mdiff.tokens import TokenSpace, hidden_canvas

SHAPE = {"width": 256, "depth": 8, "heads": 4, "mlp_width": 704}
WARM = 5


class Timed:
    """A Denoiser that notes the seconds spent in another."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.uses_time = denoiser.uses_time
        self.seconds: list[tuple[float, float]] = []

    def __call__(self, tokens: Tensor, **rest: Any) -> Tensor:
        """The other's logits."""
        begun, worked = time.perf_counter(), time.thread_time()
        logits = self.denoiser(tokens, **rest)
        self.seconds.append((time.perf_counter() - begun, time.thread_time() - worked))
        return logits


def main() -> None:
    """Print and record the share of a step outside the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=50_257)
    parser.add_argument("--samples", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    space = TokenSpace(options.vocab, mask_id=options.vocab)
    model = Timed(transformer(vocab_size=options.vocab, max_length=options.length, **SHAPE).eval())
    canvas = hidden_canvas(options.samples, options.length, space=space)
    steps = []
    with torch.inference_mode():
        begun, worked = time.perf_counter(), time.thread_time()
        for _ in first_hitting(model, canvas, space=space, seed=0):
            steps.append((time.perf_counter() - begun, time.thread_time() - worked))
            begun, worked = time.perf_counter(), time.thread_time()
    figures: dict[str, Any] = {"backend": backend_name(), **vars(options)}
    for clock, name in enumerate(("", "_processor")):
        whole, inside = ([s[clock] for s in part[WARM:]] for part in (steps, model.seconds))
        outside = statistics.median(w - i for w, i in zip(whole, inside))
        figures[f"step{name}_ms"] = 1e3 * statistics.median(whole)
        figures[f"model{name}_ms"] = 1e3 * statistics.median(inside)
        figures[f"outside{name}_ms"] = 1e3 * outside
        figures[f"share_of_step{name}"] = outside / statistics.median(whole)
        print(
            f"{'processor time' if name else 'clock'}: step {figures[f'step{name}_ms']:.2f} ms, "
            f"model {figures[f'model{name}_ms']:.2f} ms, outside {1e3 * outside:.3f} ms: "
            f"{100 * figures[f'share_of_step{name}']:.1f} percent of a step"
        )
    print(f"{torch.get_num_threads()} threads, backend {figures['backend']}")
    record("overhead", figures)


if __name__ == "__main__":
    main()
