"""Naming held-out pictures: is the right name among the best five of twenty?

    python benchmarks/naming.py MODEL DATA [--pictures N] [--draws N]

Each of N held-out pictures, drawn by a seed, is shown with the names of 20 held-out pictures, its
own among them and all different; every name is scored with the same hidden positions
(`mdiff.evaluation.ranking.rank`). Chance puts the right one among five in 25 percent. Captions
are taken
from the files' code points, and a tenth of the bases is held out, as in the recipe.
"""

from __future__ import annotations

import argparse
import random
import time
from hashlib import sha256

import torch
from machine import record

from mdiff.evaluation.ranking import rank
from mdiff.files.locate import locate
from mdiff.modalities.image.data.images import read_pictures
from mdiff.pipeline.loading import load

CANDIDATES, BEST = 20, 5


def main() -> None:
    """Print and record the share of pictures named right, at one and at five."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--pictures", type=int, default=150)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--plain", action="store_true", help="without dividing by the prior")
    options = parser.parse_args()
    pipeline = load(options.model)
    source = {"source": options.data, "captions": "unicode"}
    modality = pipeline.modality
    everything = read_pictures(source, channels=modality.codec.channels, size=modality.size)
    held = everything.split("holdout", holdout=0.1, validation=0.0)
    captions = held.captions or []
    room = modality.span("caption").stop - modality.span("caption").start
    fits = [len(modality.captions.words.encode(caption)) <= room for caption in captions]
    different = sorted({caption for caption, fit in zip(captions, fits) if fit})
    choose = random.Random(0)
    shown = choose.sample(
        [i for i, fit in enumerate(fits) if fit], min(options.pictures, sum(fits))
    )
    ranks, begun = [], time.perf_counter()
    for index in shown:
        own = captions[index]
        names = [own, *choose.sample([n for n in different if n != own], CANDIDATES - 1)]
        pixels = held.pixels[index].permute(1, 2, 0).numpy()
        with torch.inference_mode():
            score = rank(
                pipeline, {"image": pixels}, names, part="caption", draws=options.draws,
                against_prior=not options.plain,
            )  # fmt: skip
        # Ties count against the right name.
        ranks.append(int((score[1:] >= score[0]).sum()))
        if len(ranks) % 25 == 0:
            share = sum(rank < BEST for rank in ranks) / len(ranks)
            print(f"{len(ranks)} pictures: {share:.3f} in the best {BEST}", flush=True)
    count = len(ranks)
    top5, top1 = (sum(rank < best for rank in ranks) / count for best in (BEST, 1))
    print(f"{count} held-out pictures: top 5 of {CANDIDATES} {top5:.3f}, top 1 {top1:.3f}")
    record("naming", {
        "model": options.model,
        "weights_sha256": sha256(
            (locate(options.model).folder / "model.safetensors").read_bytes()
        ).hexdigest(),
        "pictures": count, "draws": options.draws,
        "against_prior": not options.plain, "top_5_of_20": top5, "top_1_of_20": top1,
        "chance_top_5": BEST / CANDIDATES, "stderr_top_5": (top5 * (1 - top5) / count) ** 0.5,
        "seconds": time.perf_counter() - begun,
    })  # fmt: skip


if __name__ == "__main__":
    main()
