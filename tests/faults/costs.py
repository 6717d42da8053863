"""A child process that trains on random bytes and says when each step ended.

    python costs.py OUT SETTINGS

SETTINGS is JSON: `width`, `depth`, `length` and what `train` takes. Rank 0 prints a JSON line for
each step, {"step": N, "at": seconds of time.monotonic()}, and what `torch.get_num_threads` says.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import torch

from mdiff.training.loop import train
from mdiff.training.recipe import parse_recipe

BYTES = 200_000


def said(line: str) -> None:
    """Each progress line is one step."""
    if line.startswith("step "):
        step = int(line.split()[1].split("/")[0])
        print(json.dumps({"step": step, "at": time.monotonic()}), flush=True)


def main(out: Path, settings: dict[str, int]) -> None:
    """Train as the settings say."""
    out.parent.mkdir(parents=True, exist_ok=True)
    source = out.parent / "noise.txt"
    if os.environ.get("RANK", "0") == "0" and not source.exists():
        letters = random.Random(0).choices("abcdefghij \n", k=BYTES)
        source.write_text("".join(letters))
    width, depth, length = (settings.pop(name) for name in ("width", "depth", "length"))
    recipe = parse_recipe({
        "data": {"source": str(source), "length": length},
        "modality": {"name": "text", "tokenizer": "byte"},
        "model": {"name": "transformer", "width": width, "depth": depth, "heads": width // 64},
        "optim": {"name": "adamw"},
        "train": settings,
        "log": {"every": 1},
    })  # fmt: skip
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    train(recipe, out, report=said)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
