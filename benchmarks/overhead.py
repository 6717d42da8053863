"""Toolkit time outside the model: first hitting, V = 50,257, L = 256.

    python benchmarks/overhead.py [--length 256] [--vocab 50257] [--samples 1]

The backbone has the shape of builtin:shakespeare with a vocabulary of its own; its calls are
timed from inside, everything else of a step is the toolkit's.
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
from mdiff.samplers.first_hitting import first_hitting
from mdiff.tokens import TokenSpace, hidden_canvas

SHAPE = {"width": 256, "depth": 8, "heads": 4, "mlp_width": 704}


class Timed:
    """A Denoiser that adds up the seconds spent in another."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.uses_time = denoiser.uses_time
        self.seconds: list[float] = []

    def __call__(self, tokens: Tensor, **rest: Any) -> Tensor:
        """The other's logits."""
        begun = time.perf_counter()
        logits = self.denoiser(tokens, **rest)
        self.seconds.append(time.perf_counter() - begun)
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
        begun = time.perf_counter()
        for _ in first_hitting(model, canvas, space=space, seed=0):
            steps.append(time.perf_counter() - begun)
            begun = time.perf_counter()
    outside = [whole - inside for whole, inside in zip(steps[5:], model.seconds[5:])]
    figures = {
        "step_ms": 1e3 * statistics.median(steps[5:]),
        "model_ms": 1e3 * statistics.median(model.seconds[5:]),
        "outside_ms": 1e3 * statistics.median(outside),
        "share_of_step": statistics.median(outside) / statistics.median(steps[5:]),
        **vars(options),
    }
    print(
        f"step {figures['step_ms']:.2f} ms, model {figures['model_ms']:.2f} ms, outside "
        f"{figures['outside_ms']:.3f} ms: {100 * figures['share_of_step']:.1f} percent of a step"
    )
    record("overhead", figures)


if __name__ == "__main__":
    main()
