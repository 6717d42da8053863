"""Rounds a token and wall time of speculative decoding beside one token a call.

    python benchmarks/speculative.py [MODEL ...] [--length 128] [--repeats 3] [--drafts 2 4 8 16]
        [--samples 1]

Drafts are accepted by the rejection test of the papers (ratio), or where they are the draw of
`any_order` (coupled); at temperature 0 both are one. `same` is the share of coupled tokens that are
those of `any_order` for the seed: all but where batches of different sizes round logits apart. The
seconds are the median over seeds, taken in turn in one process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from machine import record

from mdiff.pipeline import Pipeline, load
from mdiff.sampling import sample
from mdiff.tokens import hidden_canvas

MODELS = ("builtin:shakespeare", "builtin:emoji")
ORDERS = ("left_to_right", "random")
TEMPERATURES = (1.0, 0.0)


def main() -> None:
    """Print and record rounds, calls and seconds of every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--drafts", type=int, nargs="+", default=[2, 4, 8, 16])
    options = parser.parse_args()
    rows = []
    print(
        "model, order, temperature, drafts, rule: rounds a token, canvases a token, seconds (ratio)"
    )
    with torch.inference_mode():
        for name in options.models:
            pipeline = load(name)
            # A model of pictures has one length, its window.
            length = pipeline.window if pipeline.space.parts else options.length
            for order, temperature in itertools.product(ORDERS, TEMPERATURES):
                rows += compared(pipeline, name, order, temperature, length or 0, options)
    record("speculative", {"settings": vars(options), "rows": rows})


def compared(
    pipeline: Pipeline, name: str, order: str, temperature: float, length: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """The figures of one model, order and temperature, one row for each number of drafts."""
    canvas = hidden_canvas(options.samples, length, space=pipeline.space)
    setting: dict[str, Any] = {
        "space": pipeline.space, "order": order, "temperature": temperature,
    }  # fmt: skip
    kinds: list[dict[str, Any]] = [{"sampler": "any_order"}] + [
        {"sampler": "speculative", "drafts": drafts, "accept": accept}
        for drafts in options.drafts
        for accept in ("coupled", "ratio")[: 2 if temperature else 1]
    ]
    seconds: list[list[float]] = [[] for _ in kinds]
    runs: list[list[Any]] = [[] for _ in kinds]
    for seed, (number, kind) in itertools.product(range(options.repeats), enumerate(kinds)):
        begun = time.perf_counter()
        runs[number].append(sample(pipeline.denoiser, canvas, seed=seed, **setting, **kind))
        seconds[number].append(time.perf_counter() - begun)
    rows = []
    base = statistics.median(seconds[0])
    for kind, made, took in zip(kinds, runs, seconds):
        rounds, canvases, same = (
            torch.stack(each).double().mean().item()
            for each in (
                [run.rounds / length for run in made], [run.calls / length for run in made],
                [(run.tokens == plain.tokens).double() for run, plain in zip(made, runs[0])],
            )
        )  # fmt: skip
        median = statistics.median(took)
        row = {
            "model": name, "order": order, "temperature": temperature, **kind,
            "rounds_a_token": rounds, "canvases_a_token": canvases, "seconds": took,
            "ratio": median / base,
        }  # fmt: skip
        if kind.get("accept") == "coupled":
            row["same"] = same
        rows.append(row)
        words = f"{kind.get('drafts', 1):3} {kind.get('accept', 'any_order'):9}"
        words += f": {rounds:.3f}, {canvases:.2f}, {median:.2f} s ({row['ratio']:.2f}x)"
        words += f", same {same:.4f}" if "same" in row else ""
        print(f"{name}, {order}, {temperature:g}, {words}", flush=True)
    return rows


if __name__ == "__main__":
    main()
