"""Rounds a token and wall time of speculative decoding beside one token a call.

    python benchmarks/speculative.py [MODEL ...] [--length 128] [--repeats 3] [--drafts 2 4 8 16]
        [--samples 1] [--rejection]

Both write the same tokens for a seed, given equal logits; `same` is the share of the tokens that
they do, which rounding in batches of different sizes may lower. The seconds are the median over
seeds, taken in turn in one process. With --rejection the rounds of the test of the papers stand
beside: a draft of law q is accepted with min(1, p / q), and where it is refused the token is drawn
from what p has above q.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import torch
from machine import record
from torch import Tensor

from mdiff.denoiser import Denoiser
from mdiff.pipeline import Pipeline, load
from mdiff.sampling import sample
from mdiff.tokens import TokenSpace, hidden_canvas

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
    parser.add_argument("--rejection", action="store_true")
    options = parser.parse_args()
    rows = []
    print("model, order, temperature, drafts: rounds a token, canvases a token, seconds (ratio)")
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
    kinds: dict[int, dict[str, Any]] = {0: {"sampler": "any_order"}} | {
        drafts: {"sampler": "speculative", "drafts": drafts} for drafts in options.drafts
    }
    seconds: dict[int, list[float]] = {drafts: [] for drafts in kinds}
    runs: dict[int, list[Any]] = {drafts: [] for drafts in kinds}
    for seed, (drafts, kind) in itertools.product(range(options.repeats), kinds.items()):
        begun = time.perf_counter()
        runs[drafts].append(sample(pipeline.denoiser, canvas, seed=seed, **setting, **kind))
        seconds[drafts].append(time.perf_counter() - begun)
    rows = []
    base = statistics.median(seconds[0])
    for drafts, made in runs.items():
        rounds, canvases, same = (
            torch.stack(each).double().mean().item()
            for each in (
                [run.rounds / length for run in made], [run.calls / length for run in made],
                [(run.tokens == plain.tokens).double() for run, plain in zip(made, runs[0])],
            )
        )  # fmt: skip
        row = {
            "model": name, "order": order, "temperature": temperature, "drafts": drafts,
            "rounds_a_token": rounds, "canvases_a_token": canvases, "same": same,
            "seconds": seconds[drafts], "ratio": statistics.median(seconds[drafts]) / base,
        }  # fmt: skip
        if options.rejection and drafts and temperature == 1:
            row["rounds_a_token_by_rejection"] = statistics.mean(
                by_rejection(pipeline.denoiser, pipeline.space, length, order, drafts, seed)
                / length
                for seed in range(options.repeats * options.samples)
            )
        rows.append(row)
        words = f"{name}, {order}, {temperature:g}, {drafts or 'any_order'}: {rounds:.3f}, "
        words += f"{canvases:.2f}, {statistics.median(seconds[drafts]):.2f} s ({row['ratio']:.2f}x)"
        more = row.get("rounds_a_token_by_rejection")
        print(
            words + f", same {same:.4f}" + (f", rejection {more:.3f}" if more else ""), flush=True
        )
    return rows


def by_rejection(
    denoiser: Denoiser, space: TokenSpace, length: int, order: str, drafts: int, seed: int
) -> int:
    """The rounds of one sample with the rejection test, at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.arange(length)
    if order == "random":
        turns = torch.randperm(length, generator=generator)
    tokens, spans = hidden_canvas(1, length, space=space)[0], space.spans(length)

    def law(logits: Tensor, position: int) -> Tensor:
        """The probabilities of one position without ids that it cannot hold, (V,) float64."""
        logits = logits.double().clone()
        logits[list(space.forbidden)] = -torch.inf
        if spans is not None:
            first, stop = spans[position].tolist()
            logits[:first], logits[stop:] = -torch.inf, -torch.inf
        return logits.softmax(0)

    def drawn(p: Tensor) -> int:
        return int(torch.multinomial(p, 1, generator=generator))

    rounds = done = 0
    guess: list[tuple[int, Tensor]] = []
    while done < length:
        guess = guess[: min(drafts, length - done - 1)]
        canvases = tokens.repeat(len(guess) + 1, 1)
        for lane, (token, _) in enumerate(guess):
            canvases[lane + 1 :, turns[done + lane]] = token
        at = torch.zeros_like(canvases, dtype=torch.bool)
        next_turns = turns[done : done + len(guess) + 1 + drafts]
        at[:, next_turns] = True
        found = denoiser(canvases, at=at).view(len(canvases), len(next_turns), -1)
        rounds += 1
        column = {int(position): n for n, position in enumerate(next_turns.sort().values)}
        for lane in range(len(guess) + 1):
            position = int(turns[done])
            p, token, accepted = law(found[lane, column[position]], position), -1, False
            if lane < len(guess):
                token, q = guess[lane]
                accepted = bool(torch.rand((), generator=generator) * q[token] < p[token])
                p = p if accepted else (p - q).clamp(min=0)
            tokens[position] = token if accepted else drawn(p)
            done += 1
            if not accepted:
                break
        ahead = [int(position) for position in turns[done : done + drafts]]
        laws = [law(found[lane, column[position]], position) for position in ahead]
        guess = [(drawn(p), p) for p in laws]
    return rounds


if __name__ == "__main__":
    main()
