"""Pictures a second of every codec, and the seconds of a k-means fit, on one thread.

    python benchmarks/codecs.py [--images 512] [--repeats 5] [--fit 60000]

Encoding and decoding at 32 x 32 in colour, in batches of 64, codecs in turn in one process,
weights untrained (speed does not depend on them). The k-means fit is on grey pictures of
28 x 28: random 7 x 7 noise, enlarged. Wall seconds are what a person waits; processor seconds
are what they would be on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from machine import record
from torch import Tensor

from mdiff.modalities.image.codec import make_codec

CODECS: dict[str, dict[str, Any]] = {
    "levels": {"name": "levels", "channels": 3},
    "kmeans f4, 512 centres": {"name": "kmeans"},
    "vq f4": {"name": "vq"},
    "vq f4, local": {"name": "vq", "local": True},
    "bits f4, lfq 2 x 5": {"name": "bits", "bits": 10, "codes_per_position": 2},
    "bits f4, fsq 8 5 5 5": {"name": "bits", "quantizer": "fsq"},
}
BATCH = 64


def noise(count: int, channels: int, cells: int, side: int) -> Tensor:
    """Random pictures (N, C, side, side) uint8 of cells x cells patches that flow together."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, cells, cells, generator=random)
    fine = F.interpolate(coarse, size=(side, side), mode="bilinear")
    return (fine * 255).round().to(torch.uint8)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Print and record pictures a second and the seconds of the fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fit", type=int, default=60_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # What else was running says how far wall seconds are from a quiet machine's.
    load = os.getloadavg()[0]
    images = noise(options.images, 3, 8, 32)
    made = {name: make_codec(described) for name, described in CODECS.items()}
    made["kmeans f4, 512 centres"].fit(images)

    def around(codec: Any) -> None:
        for some in torch.split(images, BATCH):
            codec.decode(codec.encode(some))

    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for codec in made.values():
        codec.decode(codec.encode(images[:BATCH]))
    for _ in range(options.repeats):
        for name, codec in made.items():
            seconds[name].append(timed(lambda codec=codec: around(codec)))
    rates: dict[str, dict[str, Any]] = {}
    for name, runs in seconds.items():
        wall, processor = ([run[kind] for run in runs] for kind in (0, 1))
        rates[name] = {
            "images_per_second": options.images / statistics.median(wall),
            "images_per_processor_second": options.images / statistics.median(processor),
            "wall_seconds": wall,
            "processor_seconds": processor,
        }
        print(
            f"{name:24} {rates[name]['images_per_second']:9.0f} images/s "
            f"(slowest {options.images / max(wall):.0f}); "
            f"{rates[name]['images_per_processor_second']:9.0f} a processor second"
        )
    grey = noise(options.fit, 1, 7, 28)
    wall_fit, processor_fit = timed(lambda: make_codec({"name": "kmeans", "channels": 1}).fit(grey))
    print(f"kmeans fit on {options.fit}: {wall_fit:.1f} s, {processor_fit:.1f} processor seconds")
    record("codecs", {
        "load_average_before": load, "images": options.images, "size": [32, 32], "channels": 3,
        "batch": BATCH, "rates": rates,
        "kmeans_fit": {
            "images": options.fit, "size": [28, 28], "codebook_size": 512, "stride": 4,
            "wall_seconds": wall_fit, "processor_seconds": processor_fit,
        },
    })  # fmt: skip


if __name__ == "__main__":
    main()
