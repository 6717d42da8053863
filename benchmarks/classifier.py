"""The classifier of Fashion-MNIST samples: a small convolutional network of real pictures.

    OMP_NUM_THREADS=1 python benchmarks/classifier.py DATA... [--epochs 8] [--seed 0]

DATA: .npz files with `x` uint8 (N, 28, 28) and `y`, or MNIST's own, 60,000 pictures together.
The last 10,000 are the test set: never trained on, looked at once. Writes the weights and a
card into benchmarks/classifier.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import commit, machine
from torch import Tensor

from mdiff.evaluation.classifier import Classifier
from mdiff.modalities.image.data.images import Pictures, digest_of, read_pictures
from mdiff.modalities.image.data.source import PictureSource

FOLDER = Path(__file__).parent / "classifier"
LABELS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
          "ankle boot"]  # fmt: skip
SIZE = (28, 28)
TEST = 10_000
BATCH = 128
RATE = 3e-3
SHIFT = 2

# benchmarks/fashion.py and anyone else read it back by this name.


def read_fashion(paths: list[str]) -> tuple[Pictures, Pictures]:
    """The pictures to train on and the last 10,000, the test set."""
    everything = read_pictures(PictureSource(source=paths), channels=1, size=SIZE)
    number = torch.arange(len(everything))
    return everything.at(number[:-TEST]), everything.at(number[-TEST:])


def varied(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The batch (B, C, H, W) uint8, a random half flipped, each moved by up to two pixels."""
    rows, _, height, width = pictures.shape
    flip = torch.rand(rows, generator=generator) < 0.5
    pictures = torch.where(flip[:, None, None, None], pictures.flip(3), pictures)
    padded = F.pad(pictures, (SHIFT,) * 4)
    move = torch.randint(0, 2 * SHIFT + 1, (rows, 2), generator=generator)
    down = move[:, :1] + torch.arange(height)
    right = move[:, 1:] + torch.arange(width)
    return padded[torch.arange(rows)[:, None, None], :, down[:, :, None], right[:, None]].permute(
        0, 3, 1, 2
    )


def train(classifier: Classifier, pictures: Pictures, *, epochs: int, seed: int) -> None:
    """AdamW with one cycle of the rate (Smith & Topin 2018), light label smoothing."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(pictures) // BATCH * epochs
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=RATE, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    labels = pictures.labels
    if labels is None:
        raise SystemExit("the pictures have no labels")
    for epoch in range(epochs):
        classifier.train()
        total = 0.0
        order = torch.randperm(len(pictures), generator=generator)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            logits = classifier(varied(pictures.pixels[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}: loss {total * BATCH / len(order):.4f}", file=sys.stderr)


def main() -> None:
    """Train, test once, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    learnt, test = read_fashion(options.data)
    classifier = Classifier(size=SIZE, channels=1, labels=LABELS)
    begun = time.perf_counter()
    train(classifier, learnt, epochs=options.epochs, seed=options.seed)
    seconds = time.perf_counter() - begun
    right = classifier.logits(test.pixels).argmax(1) == test.labels
    accuracy = float(right.double().mean())
    print(f"test accuracy {accuracy:.4f} on {len(test):,} pictures, {seconds:.0f} s")
    classifier.save(
        FOLDER,
        card={
            "what": "a classifier of Fashion-MNIST, for samples",
            "data": "Fashion-MNIST (MIT, github.com/zalandoresearch/fashion-mnist), the first "
            "50,000 pictures of its training file; the last 10,000 are the test set",
            "test_accuracy": accuracy,
            "test_sha256": digest_of(test),
            "epochs": options.epochs,
            "seed": options.seed,
            "seconds": seconds,
            "machine": machine(),
            "commit": commit(),
        },
    )


if __name__ == "__main__":
    main()
