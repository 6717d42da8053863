"""Given tokens that change under random masks: none, for every sampler.

    python benchmarks/inpainting.py [--masks 10000] [--batch 250] [--seed 0]

Each sampler fills `--masks` canvases, half at its defaults and half at few calls, in batches
that mix masks: scattered positions, a rectangle, all but a rectangle, runs of rows, everything and
nothing, at any share; every second batch has rows of different lengths. The denoiser gives new
random logits at every call, so that a token that is drawn again would change. Counted are given
tokens that changed, masks left, ids drawn that may not be, and fully given rows that cost a call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from machine import record
from torch import Tensor

from mdiff import TokenSpace, sample
from mdiff.find import names

GRIDS = ((8, 8), (5, 12), (16, 4))
SPACE = TokenSpace(34, mask_id=32, never=(33,))
FEW_CALLS: dict[str, dict[str, Any]] = {
    "ancestral": {"steps": 8},
    "any_order": {"steps": 8, "order": "random"},
    "blocks": {"inner": "confidence", "block_length": 16, "steps": 2, "noise": 4.5},
    "confidence": {"steps": 8, "noise": 4.5},
    "first_hitting": {"per_call": 8},
    "halton": {"steps": 8, "roll": True},
}
FAULTS = ("given tokens changed", "masks left", "forbidden ids", "calls without need")


class RandomDenoiser:
    """New logits at each call, the forbidden columns above all others."""

    uses_time = False

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, tokens: Tensor, *, at: Tensor | None = None, **rest: Any) -> Tensor:
        """Logits (B, L, V), or the rows `at` (N, V)."""
        shape = tuple(tokens.shape) if at is None else (int(at.sum()),)
        logits = 3 * torch.randn(*shape, SPACE.vocab_size, generator=self.generator)
        logits[..., list(SPACE.forbidden)] = 30.0
        return logits


def holes(rows: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Masks (rows, h * w) bool, True where a token is to be generated, of six kinds in turn."""
    h, w = grid
    ends = torch.rand(rows, 2, 2, generator=generator).sort(-1).values
    position = torch.stack([torch.arange(h * w) // w / h, torch.arange(h * w) % w / w])
    inside = (position >= ends[..., :1]) & (position < ends[..., 1:])
    scattered = torch.rand(rows, h * w, generator=generator) < ends[:, 0, :1]
    kinds = torch.stack([
        scattered, inside.all(1), ~inside.all(1), inside[:, 0],
        torch.ones_like(scattered), torch.zeros_like(scattered),
    ])  # fmt: skip
    return kinds[torch.arange(rows) % len(kinds), torch.arange(rows)]


def batches(masks: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """Canvases (B, L) with masks of all kinds, `valid` or None, and whether to take few calls."""
    generator = torch.Generator().manual_seed(seed)
    for number, first in enumerate(range(0, masks, size)):
        rows, grid = min(size, masks - first), GRIDS[number % len(GRIDS)]
        tokens = torch.randint(0, SPACE.mask_id, (rows, grid[0] * grid[1]), generator=generator)
        canvas = torch.where(holes(rows, grid, generator), SPACE.mask_id, tokens)
        valid = None
        if number % 2:
            lengths = torch.randint(1, tokens.shape[1] + 1, (rows, 1), generator=generator)
            valid = torch.arange(tokens.shape[1]) < lengths
        yield canvas, valid, number % 4 >= 2


def faults(name: str, masks: int, size: int, seed: int) -> dict[str, int]:
    """What went wrong for one sampler, with the tokens that were given and drawn."""
    found = dict.fromkeys((*FAULTS, "given", "drawn", "calls"), 0)
    denoiser = RandomDenoiser(seed)
    for number, (canvas, valid, few) in enumerate(batches(masks, size, seed)):
        # A copy goes in, so that a sampler that writes into its argument is caught too.
        out = sample(
            denoiser, canvas.clone(), space=SPACE, sampler=name, seed=seed + number, valid=valid,
            **(FEW_CALLS.get(name, {}) if few else {}),
        )  # fmt: skip
        counted = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
        hidden = (canvas == SPACE.mask_id) & counted
        new = out.tokens[hidden]
        found["given tokens changed"] += int((out.tokens[~hidden] != canvas[~hidden]).sum())
        found["masks left"] += int((new == SPACE.mask_id).sum())
        found["forbidden ids"] += int(torch.isin(new, torch.tensor(SPACE.forbidden)).sum())
        found["calls without need"] += int(out.calls[~hidden.any(1)].sum())
        found["given"] += int((counted & ~hidden).sum())
        found["drawn"] += len(new)
        found["calls"] += int(out.calls.sum())
    return found


def main() -> None:
    """Print and record the faults of every sampler."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--masks", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict[str, Any] = {"masks": options.masks, "batch": options.batch, "samplers": {}}
    for name in names("samplers"):
        begun = time.perf_counter()
        found = faults(name, options.masks, options.batch, options.seed)
        found_and_time = {**found, "seconds": round(time.perf_counter() - begun, 1)}
        figures["samplers"][name] = found_and_time
        print(f"{name:14}", "  ".join(f"{key} {value}" for key, value in found_and_time.items()))
    figures["faults"] = sum(
        figures["samplers"][name][fault] for name in figures["samplers"] for fault in FAULTS
    )
    record("inpainting", figures)


if __name__ == "__main__":
    main()
