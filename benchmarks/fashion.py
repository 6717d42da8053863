"""Samples of Fashion-MNIST against real pictures: quality by sampler and number of calls.

    python benchmarks/fashion.py MODEL DATA... [--n 1000] [--samplers halton ...]
        [--steps 4 8 16 32 64] [--guidance-scale 1 2 ...] [--temperature 1 ...] [--noise 0 ...]

MODEL is builtin:fashion, a run or a checkpoint; DATA are 60,000 pictures, of which the last
10,000, the test set, are what samples are held against. The classifier is benchmarks/classifier.
Every combination of the options is drawn: `n` samples, the ten labels in turn. The table's columns:

    label      share of samples that the classifier gives the asked label
    diversity  mean distance of two samples of a label, over that of two test pictures
    nearest    mean distance to the nearest training picture, over that of test pictures
    frechet    squared Frechet distance to the test set in the classifier's 64 features

What real pictures get is in the first line. Writes results/fashion.json and the curve,
results/fashion.svg.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import Any

import torch
from classifier import FOLDER, read_fashion
from machine import RESULTS, record

from mdiff.evaluation.classifier import Classifier, load_classifier
from mdiff.evaluation.image_metrics import classifier_agreement, diversity, frechet, nearest
from mdiff.evaluation.images import Drawn, draw_pictures, spread, with_model_labels
from mdiff.files.curves import Curve, write_curves
from mdiff.files.locate import locate
from mdiff.modalities.image.data.images import Pictures
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

SAMPLERS = ("confidence", "halton", "first_hitting", "ancestral")
STEPS = (4, 8, 16, 32, 64)
COLUMNS = ("label", "diversity", "nearest", "frechet")
# Test pictures whose nearest training picture is looked for.
SOME = 1000
# The numbers of the project's goal, at 16 steps.
FEW, MANY, CLOSE = 16, 64, 1.15


@dataclass(frozen=True)
class Setting:
    """One way to draw; `steps` is how many calls are asked for."""

    sampler: str
    steps: int
    guidance_scale: float
    temperature: float
    noise: float

    @property
    def series(self) -> str:
        """Everything but the steps: one line of the curve."""
        name = f"{self.sampler}, guidance {self.guidance_scale:g}"
        name += f", temperature {self.temperature:g}" if self.temperature != 1 else ""
        return name + (f", noise {self.noise:g}" if self.noise else "")

    def options(self, positions: int) -> dict[str, Any]:
        """The options of Pipeline.generate for a canvas of so many positions."""
        found: dict[str, Any] = {"sampler": self.sampler, "temperature": self.temperature}
        if self.sampler == "first_hitting":
            found["per_call"] = -(-positions // self.steps)
        else:
            found["steps"] = self.steps
        if self.sampler == "confidence":
            found["noise"] = self.noise
        if self.guidance_scale != 1:
            found["guidance_scale"] = self.guidance_scale
        return found


class Reference:
    """The real pictures, and what is computed of them once."""

    def __init__(
        self, train: Pictures, test: Pictures, classifier: Classifier, names: list[str]
    ) -> None:
        self.train, self.test, self.classifier = train, test, classifier
        # The classifier numbers its labels in its own way.
        self.number = torch.tensor([classifier.labels.index(name) for name in names])
        self.features = classifier.features(test.pixels)
        few = spread(test, SOME).pixels
        self.distance = nearest(few, train=train.pixels, test=few).test

    def figures(self, drawn: Drawn) -> dict[str, float]:
        """The four columns."""
        pictures, labels = drawn.pictures, drawn.labels
        return {
            "label": classifier_agreement(self.classifier.logits(pictures), self.number[labels]),
            "diversity": diversity(
                self.test.pixels, pictures, real_labels=self.test.labels, fake_labels=labels
            ),
            # The second set is looked at once, above.
            "nearest": nearest(pictures, train=self.train.pixels, test=pictures[:1]).samples
            / self.distance,
            "frechet": frechet(self.features, self.classifier.features(pictures)),
        }


def real_figures(reference: Reference, n: int) -> dict[str, float]:
    """What n real pictures get: of the test set where nearness is asked, else of the training."""
    train, test = spread(reference.train, n), spread(reference.test, n)
    one = reference.figures(Drawn(train.pixels, train.labels, 0.0, 0.0))
    other = reference.figures(Drawn(test.pixels, test.labels, 0.0, 0.0))
    return {"label": other["label"], "diversity": one["diversity"], "nearest": other["nearest"],
            "frechet": one["frechet"]}  # fmt: skip


def settings(options: argparse.Namespace) -> list[Setting]:
    """Every combination; noise is an option of confidence alone."""
    return [
        Setting(sampler, steps, scale, temperature, noise)
        for sampler, scale, temperature, noise, steps in product(
            options.samplers, options.guidance_scale, options.temperature, options.noise,
            options.steps,
        )
        if sampler == "confidence" or noise == options.noise[0]
    ]  # fmt: skip


def measured(
    pipeline: Pipeline, reference: Reference, setting: Setting, *, n: int, seed: int, batch: int
) -> dict[str, Any]:
    """The figures of one setting, with its calls and its time."""
    drawn = draw_pictures(
        pipeline, n, seed=seed, batch_size=batch,
        **setting.options(pipeline.modality.length),
    )  # fmt: skip
    branches = 1 if setting.guidance_scale == 1 else 2
    found = {
        "series": setting.series, "sampler": setting.sampler, "steps": setting.steps,
        "guidance_scale": setting.guidance_scale, "temperature": setting.temperature,
        "calls": drawn.calls / branches, "evaluations": drawn.calls,
        "samples_per_second": n / drawn.seconds,
    }  # fmt: skip
    return found | reference.figures(drawn)


def against_many(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of each series with both, the Frechet distance at few steps over that at many."""
    by_steps = {(row["series"], row["steps"]): row["frechet"] for row in rows}
    return {
        series: by_steps[series, FEW] / by_steps[series, MANY]
        for series in dict.fromkeys(row["series"] for row in rows)
        if (series, FEW) in by_steps and (series, MANY) in by_steps
    }


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    calls = f"{row['calls']:6.1f}" if "calls" in row else " " * 6
    print(f"{name:48} {calls} " + " ".join(f"{row[column]:10.4f}" for column in COLUMNS))


def main() -> None:
    """Print and record the table, and draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--guidance-scale", nargs="+", type=float, default=[1.0])
    parser.add_argument("--temperature", nargs="+", type=float, default=[1.0])
    parser.add_argument("--noise", nargs="+", type=float, default=[0.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--name", default="fashion", help="of the results")
    options = parser.parse_args()
    pipeline, classifier = load(options.model), load_classifier(FOLDER)
    train, test = (with_model_labels(p, pipeline.modality) for p in read_fashion(options.data))
    reference = Reference(train, test, classifier, pipeline.modality.labels)
    print(f"{'':48} {'calls':>6} " + " ".join(f"{column:>10}" for column in COLUMNS))
    real = real_figures(reference, options.n)
    show(f"{options.n} real pictures", real)
    rows = []
    for setting in settings(options):
        row = measured(
            pipeline, reference, setting, n=options.n, seed=options.seed, batch=options.batch
        )
        show(setting.series, row)
        sys.stdout.flush()
        rows.append(row)
    ratios = against_many(rows)
    for series, ratio in ratios.items():
        verdict = f"{'' if ratio <= CLOSE else 'not '}within {CLOSE}"
        print(f"{series}: Frechet at {FEW} steps over that at {MANY} is {ratio:.3f}, {verdict}")
    curves = [
        Curve(series, [(row["calls"], row["frechet"]) for row in rows if row["series"] == series])
        for series in dict.fromkeys(row["series"] for row in rows)
    ]
    write_curves(
        curves, RESULTS / f"{options.name}.svg", x="calls of the model",
        y=f"Frechet distance, {options.n} samples (classifier's features)",
        floor=("real pictures", real["frechet"]),
    )  # fmt: skip
    weights = (locate(options.model).folder / "model.safetensors").read_bytes()
    card = {
        "model": options.model,
        "weights_sha256": sha256(weights).hexdigest(),
        "n": options.n,
        "seed": options.seed,
        "space": "the classifier's 64 features",
    }
    record(options.name, card | {"real": real, "rows": rows, "few_over_many": ratios})


if __name__ == "__main__":
    main()
