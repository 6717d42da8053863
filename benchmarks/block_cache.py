"""A step of a block model on its block alone, against one on the whole canvas.

    python benchmarks/block_cache.py [--length 512] [--block 32] [--layers 12] [--repeats 5]
    python benchmarks/block_cache.py --family sdar --block 4

The model has the layout of LLaDA2, or SDAR's, with random weights; by default its layers are dense,
with --experts they are mixtures. A step is one call for the hidden positions of a block. Beside it,
generations by `blocks` of four steps a block, including the passes that cache finished blocks. On
one thread; the two sides take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import record
from torch import Tensor

import mdiff
from mdiff.backbones.layers.backbone import Backbone
from mdiff.denoiser.block_cache import FinishedBlocks
from mdiff.pipeline.published import built
from mdiff.samplers.confidence import confidence
from mdiff.tokens import TokenSpace

VOCAB, WIDTH, STEPS = 4096, 512, 4
MASK = VOCAB - 1
# Blocks that a generation writes.
MOST_BLOCKS = 15


def model_of(options: argparse.Namespace) -> Backbone:
    """The model in the layout of the family, with weights at random."""
    family = "adapted" if options.family == "sdar" else "llada2_moe"
    model = built(family, {
        "architectures": ["SDARMoeForCausalLM" if options.experts else "SDARForCausalLM"],
        "head_dim": 64, "norm_topk_prob": True, "hidden_act": "silu", "block_size": options.block,
        "hidden_size": WIDTH, "num_hidden_layers": options.layers, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 3 * WIDTH,
        "moe_intermediate_size": WIDTH // 2,
        "num_experts": 16, "num_experts_per_tok": 2, "num_shared_experts": 1, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 1.0, "vocab_size": VOCAB,
        "first_k_dense_replace": 0 if options.experts else options.layers,
        "partial_rotary_factor": 1.0 if options.family == "sdar" else 0.5,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "max_position_embeddings": options.length, "block_length": options.block,
    }).to_empty(device="cpu").eval()  # fmt: skip
    for name, tensor in model.state_dict().items():
        torch.nn.init.ones_(tensor) if "norm" in name else torch.nn.init.normal_(tensor, std=0.02)
    return model


class Whole:
    """The same block model without a cache: every call computes the whole canvas."""

    uses_time = False

    def __init__(self, model: Backbone) -> None:
        self.model, self.block_length = model, model.block_length

    def features(self, tokens: Tensor, **rest: Any) -> Tensor:
        """What the head reads."""
        return self.model.features(tokens, **rest)

    @property
    def head(self) -> torch.nn.Module:
        """The model's own head."""
        return self.model.head

    def __call__(self, tokens: Tensor, **rest: Any) -> Tensor:
        """The model's logits."""
        logits: Tensor = self.model(tokens, **rest)
        return logits


def seconds(run: Callable[[], Any]) -> float:
    """The wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """The seconds of each side, after one run of each that is not counted."""
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(seconds(run))
    return times


def step_times(model: Backbone, options: argparse.Namespace, start: int) -> dict[str, list[float]]:
    """The seconds of a step on the block that begins at `start`."""
    tokens = torch.randint(0, MASK, (1, options.length))
    tokens[:, start:] = MASK
    finished = FinishedBlocks(model, model.new_cache())
    cache = finished.before(tokens, start)
    own = slice(start, start + options.block)
    at = torch.zeros_like(tokens, dtype=torch.bool)
    at[:, own] = True
    sides = {
        "cached": lambda: model(tokens[:, own], at=at[:, own], cache=cache),
        "whole": lambda: model(tokens, at=at),
    }
    difference = (sides["cached"]() - sides["whole"]()).abs().max()
    print(f"block at {start}: largest difference of logits {float(difference):.1e}")
    return in_turns(sides, options.repeats)


def generation_times(model: Backbone, options: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of a generation of the last blocks behind what is given, one block at least."""
    canvas = torch.full((1, options.length), MASK)
    given = max(options.block, options.length - MOST_BLOCKS * options.block)
    canvas[:, :given] = torch.randint(0, MASK, (1, given))

    def generated(denoiser: Any) -> Any:
        return mdiff.sample(
            denoiser, canvas, space=TokenSpace(VOCAB, mask_id=MASK), sampler="blocks",
            block_length=options.block, inner=confidence, steps=STEPS, counts="even",
        )  # fmt: skip

    return in_turns(
        {"cached": lambda: generated(model), "whole": lambda: generated(Whole(model))},
        max(1, options.repeats // 3),
    )


def main() -> None:
    """Print and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("length", 512), ("block", 32), ("layers", 12), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--family", choices=("llada2_moe", "sdar"), default="llada2_moe")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figures: dict[str, Any] = {**vars(options), "width": WIDTH, "vocab": VOCAB}
    with torch.no_grad():
        model = model_of(options)
        last = options.length - options.block
        middle = last // 2 // options.block * options.block
        sides = {
            "step_in_the_middle": step_times(model, options, middle),
            "step_at_the_end": step_times(model, options, last),
            "generation": generation_times(model, options),
        }
    for name, times in sides.items():
        cached, whole = (statistics.median(times[side]) for side in ("cached", "whole"))
        ratios = sorted(w / c for w, c in zip(times["whole"], times["cached"]))
        figures[name] = {
            "cached_seconds": cached, "whole_seconds": whole, "ratio": whole / cached,
            "least_ratio": ratios[0], "most_ratio": ratios[-1],
        }  # fmt: skip
        print(
            f"{name}: cached {1e3 * cached:.1f} ms, whole {1e3 * whole:.1f} ms, "
            f"{whole / cached:.1f} times ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        )
    name = "block_cache" if options.family == "llada2_moe" else f"block_cache_{options.family}"
    record(f"{name}_experts" if options.experts else name, figures)


if __name__ == "__main__":
    main()
