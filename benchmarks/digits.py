"""The digits recipe, live: its bound against the per-position marginal, and what it draws.

    python benchmarks/digits.py [--set a.b=c]... [--out DIR]

Trains configs/image/digits.yaml from nothing, then scores the held-out tenth by the any-order
bound beside the marginal of each position (add one half, from the training split), and asks three
nearest neighbours in pixels, fitted on the training split, which digit each sample is.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from machine import record
from sklearn.neighbors import KNeighborsClassifier

from mdiff.objective.bound import nll_bound
from mdiff.pipeline.loading import load
from mdiff.training.loop import train
from mdiff.training.recipe import load_recipe

RECIPE = Path(__file__).parent.parent / "configs" / "image" / "digits.yaml"
NEIGHBOURS, SAMPLES, STEPS, SCALE = 3, 20, 32, 1.5


def marginal_bits(train_tokens: torch.Tensor, tokens: torch.Tensor, ids: int) -> float:
    """Bits a token of `tokens` (N, L) under each position's own frequencies in training."""
    counts = torch.nn.functional.one_hot(train_tokens, ids).sum(0).double() + 0.5
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    nats = -log_p[torch.arange(tokens.shape[1]), tokens]
    return float(nats.mean()) / math.log(2)


def main() -> None:
    """Print and record both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    recipe = load_recipe(RECIPE, options.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        begun = time.perf_counter()
        folder = train(recipe, options.out or Path(scratch) / "digits")
        trained = time.perf_counter() - begun
        pipeline = load(folder)
        modality = pipeline.modality
        rows = {
            split: modality.examples(recipe.data.options, split=split)
            for split in ("train", "holdout")
        }
        batches = {
            split: each.batch(torch.arange(len(each)), torch.zeros(len(each), dtype=torch.int64))
            for split, each in rows.items()
        }
        held = batches["holdout"]
        bound = nll_bound(
            pipeline.denoiser, held.tokens, space=pipeline.space, schedule=pipeline.schedule,
            draws=32, seed=0, cond=held.cond,
        )  # fmt: skip
        bits = float(bound.nats.mean()) / held.tokens.shape[1] / math.log(2)
        scored = time.perf_counter() - begun
        ids = pipeline.space.vocab_size
        marginal = marginal_bits(batches["train"].tokens, held.tokens, ids)
        neighbours = KNeighborsClassifier(NEIGHBOURS)
        neighbours.fit(batches["train"].tokens.numpy(), batches["train"].cond["label"].numpy())
        labels = [i // SAMPLES for i in range(10 * SAMPLES)]
        drawn = pipeline.generate(
            [{"label": label} for label in labels], sampler="confidence", steps=STEPS, noise=2.0,
            guidance_scale=SCALE, batch_size=100,
        )  # fmt: skip
        named = neighbours.predict([sample.tokens for sample in drawn])
        whole = time.perf_counter() - begun
    agreement = sum(int(a) == b for a, b in zip(named, labels)) / len(labels)
    real = neighbours.score(held.tokens.numpy(), held.cond["label"].numpy())
    print(f"bound {bits:.4f} bits per dim, marginal {marginal:.4f}, in {scored:.0f} s")
    print(f"{agreement:.3f} of samples are the asked digit to 3-NN ({real:.3f} of real ones)")
    record("digits", {
        "bits_per_dim": bits, "marginal_bits_per_dim": marginal, "asked_label_by_3nn": agreement,
        "real_label_by_3nn": real, "samples": len(labels), "train_seconds": trained,
        "seconds_to_bound": scored, "seconds": whole, "overrides": options.overrides,
    })  # fmt: skip


if __name__ == "__main__":
    main()
