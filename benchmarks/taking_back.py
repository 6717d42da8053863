"""Does taking back help? Samplers that revise beside others, at 16, 32, 64 and 128 calls a sample.

    python benchmarks/taking_back.py text TEXT [--work 1024] [--calls 16 32 64 128]
    python benchmarks/taking_back.py pictures PICTURES [--n 24]
    python benchmarks/taking_back.py toy

Text: samples of 128 tokens of builtin:shakespeare. `ngram` is the mean of -log2 p a character of a
Kneser-Ney model of 5 characters, trained on all of TEXT; `bound` the model's own in bits a token;
`distinct` the share of a sample's pairs of tokens that are not a repetition. `work` evaluations are
spent on each setting: fewer samples where a sample has more calls. Each with its standard error.

Pictures: builtin:emoji, the picture given the name, for `n` held-out names spread over all of them.
`frechet` is the squared Frechet distance to all held-out pictures in pixels averaged to 4 x 4; its
standard error is by the jackknife over samples. It falls with n: compare it with that of as many
held-out pictures, in the first line. `empty` is the share of pictures with hardly a pixel that is
not white.

Toy: the total variation of every sampler from an exactly known joint, as in `mdiff bench
--samplers`, by 20,000 samples.

Writes results/taking_back_text.json, _pictures.json or _toy.json, and of the first two a curve.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, record
from ngrams import KneserNey, read
from torch import Tensor

from mdiff.evaluation.bench.samplers import jackknife, toy_floor, toy_rows
from mdiff.evaluation.image_metrics import frechet, pixel_features
from mdiff.files.curves import Curve, write_curves
from mdiff.modalities.image.data.images import read_pictures
from mdiff.objective import nll_bound
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

LENGTH, ORDER, SIDE, TOY = 128, 5, 4, 20_000
# A pixel this dark is not white; a picture with fewer of them, of 1,024, is empty.
WHITE, FEW = 245, 10
# The nats a call with which budget comes nearest to so many calls, found by trial.
NATS = {"text": {16: 40.0, 32: 15.5, 64: 6.0, 128: 0.0},
        "pictures": {16: 19.5, 32: 9.3, 64: 3.6, 128: 0.0}}  # fmt: skip


def settings(calls: int, hidden: int, medium: str) -> dict[str, dict[str, Any]]:
    """The options of each sampler for so many calls on so many hidden positions."""
    return {
        "first_hitting": {"per_call": -(-hidden // calls)},
        "confidence": {"steps": calls},
        "confidence, noise 4.5": {"steps": calls, "noise": 4.5},
        "budget": {"nats_per_call": NATS[medium].get(calls, 0.0)},
        "remdm": {"steps": calls},
        "path_planning": {"steps": calls},
    }


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """The mean and its standard error."""
    found = torch.tensor(values, dtype=torch.float64)
    return {"value": float(found.mean()), "stderr": float(found.std()) / math.sqrt(len(values))}


class Texts:
    """Texts of one length and their judges."""

    medium, columns = "text", ("ngram", "bound", "distinct")

    def __init__(self, pipeline: Pipeline, data: str, options: argparse.Namespace) -> None:
        text = read(Path(data))
        self.pipeline, self.work, self.hidden = pipeline, options.work, LENGTH
        self.judge = KneserNey(text, ORDER)
        size = 4 * LENGTH
        cuts = torch.linspace(0, len(text) - size, 16).long().tolist()
        self.real = {"ngram": mean_of([self.ngram(text[i : i + size]) for i in cuts])}

    def canvases(self, calls: int) -> list[list[int]]:
        """Masks only, as many rows as the work pays for."""
        return self.pipeline.canvases("", num_samples=max(2, self.work // calls), length=LENGTH)

    def ngram(self, text: str) -> float:
        """Bits a character of the judge, from the second character on."""
        return self.judge.bits_per_char(text, 1)

    def figures(self, tokens: Tensor) -> dict[str, dict[str, float]]:
        """The columns."""
        bound = nll_bound(
            self.pipeline.denoiser, tokens, space=self.pipeline.space,
            schedule=self.pipeline.schedule, draws=2, seed=0,
        ).nats / (LENGTH * math.log(2))  # fmt: skip
        pairs = [len(set(pairwise(row))) / (LENGTH - 1) for row in tokens.tolist()]
        texts = [self.pipeline.modality.decode(row) for row in tokens.tolist()]
        return {
            "ngram": mean_of([self.ngram(text) for text in texts]),
            "bound": mean_of(bound.tolist()), "distinct": mean_of(pairs),
        }  # fmt: skip


class Names:
    """Pictures of held-out names, and the held-out pictures."""

    medium, columns = "pictures", ("frechet", "empty")

    def __init__(self, pipeline: Pipeline, data: str, options: argparse.Namespace) -> None:
        self.pipeline, modality = pipeline, pipeline.modality
        source = {"source": data, "captions": "unicode"}
        held = read_pictures(source, channels=3, size=modality.size).split(
            "holdout", holdout=0.1, validation=0.0
        )
        span = modality.span("caption")
        self.hidden = modality.length - (span.stop - span.start)
        room = span.stop - span.start
        fits = [i for i, name in enumerate(held.captions or [])
                if len(modality.captions.words.encode(name)) <= room]  # fmt: skip
        chosen = [fits[i * len(fits) // options.n] for i in range(options.n)]
        self.prompts = [{"caption": (held.captions or [])[i]} for i in chosen]
        self.features = pixel_features(held.pixels, side=SIDE)
        self.real = self.of_pictures(held.pixels[torch.tensor(chosen)])

    def canvases(self, calls: int) -> list[list[int]]:
        """The names, each with a hidden picture."""
        return self.pipeline.canvases(self.prompts)

    def of_pictures(self, pictures: Tensor) -> dict[str, dict[str, float]]:
        """The columns of pictures (N, 3, H, W) uint8."""
        drawn = (pictures.amin(1) < WHITE).flatten(1).sum(1)
        value, stderr = jackknife(
            lambda some: frechet(self.features, some), pixel_features(pictures, side=SIDE)
        )
        return {
            "frechet": {"value": value, "stderr": stderr},
            "empty": mean_of((drawn < FEW).double().tolist()),
        }

    def figures(self, tokens: Tensor) -> dict[str, dict[str, float]]:
        """The columns."""
        return self.of_pictures(self.pipeline.modality.shown(tokens))


def main() -> None:
    """Print and record the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("medium", choices=["text", "pictures", "toy"])
    parser.add_argument("data", nargs="?", help="a text, or pictures")
    parser.add_argument("--calls", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--work", type=int, default=1024, help="evaluations a setting of text")
    parser.add_argument("--n", type=int, default=24, help="pictures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.medium == "toy":
        found = [row.as_json() for row in toy_rows(TOY, print)]
        record("taking_back_toy", {"samples": TOY, "floor": toy_floor(TOY), "rows": found})
        return
    if options.data is None:
        parser.error(f"{options.medium} needs data")
    name = {"text": "builtin:shakespeare", "pictures": "builtin:emoji"}[options.medium]
    side = {"text": Texts, "pictures": Names}[options.medium](load(name), options.data, options)
    show("of the data", "", side.real)
    rows, begun = [], time.perf_counter()
    for calls in options.calls:
        for series, own in settings(calls, side.hidden, side.medium).items():
            row = measured(side, series, own, calls)
            show(f"{series} {own}", f"{row['calls']:.1f}", row["figures"])
            rows.append(row)
        # After each number of calls, so that a run that is ended early leaves what it has.
        write_down(name, side, rows, time.perf_counter() - begun)


def write_down(model: str, side: Texts | Names, rows: list[dict[str, Any]], seconds: float) -> None:
    """Record the rows and draw the curve of the first column."""
    record(f"taking_back_{side.medium}", {
        "model": model, "hidden_positions": side.hidden, "data": side.real, "rows": rows,
        "seconds": seconds,
    })  # fmt: skip
    first = side.columns[0]
    curves = [
        Curve(series, [(row["calls"], row["figures"][first]["value"])
                       for row in rows if row["series"] == series])
        for series in dict.fromkeys(row["series"] for row in rows)
    ]  # fmt: skip
    write_curves(
        curves, RESULTS / f"taking_back_{side.medium}.svg", x="calls of the model a sample",
        y={"ngram": "bits a character of an n-gram", "frechet": "Frechet distance, pixels"}[first],
        floor=("of the data", side.real[first]["value"]),
    )  # fmt: skip


def measured(side: Texts | Names, series: str, own: dict[str, Any], calls: int) -> dict[str, Any]:
    """One setting: its cost, what it took back and its figures."""
    canvases = side.canvases(calls)
    sampler = series.partition(",")[0]
    (run,) = side.pipeline.runs(canvases, sampler=sampler, seed=1, batch_size=len(canvases), **own)
    run.finished()
    made = run.tally.sample()
    again = (made.writing.times - 1).clamp(min=0).sum(1).double()
    return {
        "series": series, "sampler": sampler, "options": own, "asked_calls": calls,
        "samples": len(canvases), "calls": float(made.calls.double().mean()),
        "written_again": float(again.mean()), "seconds": run.seconds,
        "figures": side.figures(made.tokens),
    }  # fmt: skip


def show(name: str, calls: str, figures: dict[str, dict[str, float]]) -> None:
    """A line of the table."""
    shown = (f"{key} {one['value']:.4f} +- {one['stderr']:.4f}" for key, one in figures.items())
    print(f"{name:52} {calls:>6}  " + "  ".join(shown), flush=True)


if __name__ == "__main__":
    main()
