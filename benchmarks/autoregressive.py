"""An autoregressive model of the same size, data and optimiser: the baseline beside the bound.

    python benchmarks/autoregressive.py RECIPE.yaml [--set a.b=c]... [--steps N]

The recipe's own transformer made causal, its tokenizer, rows, optimiser and batch, at most as
many steps. Every token of a row is predicted from those before it, the first from the mask id
as a start. Dropout and weight decay are the recipe's. Such a model overfits a small text long
before the masked one, so the averaged weights that score best on the validation slice are
kept; only those are then scored, once, on the held-out tenth, in the same windows.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import record
from torch import Tensor, nn

from mdiff.find import find
from mdiff.kernels import philox
from mdiff.modalities.text.documents import Source, cut_documents
from mdiff.training.batches import rows_of_step
from mdiff.training.optim import AveragedWeights, optimizers, rate_at
from mdiff.training.recipe import Recipe, load_recipe

CHECK_EVERY = 100


def shifted(tokens: Tensor, start: int) -> Tensor:
    """What is read to predict `tokens` (B, L): the start id, then all but the last."""
    return torch.cat([torch.full_like(tokens[:, :1], start), tokens[:, :-1]], 1)


def nats(model: nn.Module, examples: Any, start: int) -> float:
    """-log p of every token of the examples, in nats, rows side by side."""
    total = 0.0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for rows in torch.arange(len(examples)).split(32):
            batch = examples.batch(rows, torch.zeros_like(rows))
            logits = model(shifted(batch.tokens, start)).float()
            nll = F.cross_entropy(logits.transpose(1, 2), batch.tokens, reduction="none")
            total += float(nll.sum() if batch.valid is None else nll[batch.valid].sum())
    model.train()
    return total


def weights_of(model: nn.Module, averaged: AveragedWeights | None) -> dict[str, Tensor]:
    """The averaged weights, or the plain ones where there is no average."""
    if averaged is not None:
        return {name: tensor.clone() for name, tensor in averaged.tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


class Swapped:
    """Within it, the model has other weights."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def __enter__(self) -> None:
        self.own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.load(self.weights)

    def __exit__(self, *_: object) -> None:
        self.load(self.own)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Copy these into the model."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])


def step(model: nn.Module, made: list[Any], tokens: Tensor, start: int, recipe: Recipe) -> float:
    """One update on `tokens` (B, L); the loss in nats a token."""
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16"):
        logits = model(shifted(tokens, start))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
    loss.backward()
    if recipe.optim.grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.grad_clip)
    for optimizer in made:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Train, choose on the validation slice, score the held-out tenth, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--steps", type=int, help="stop early, the rate falling to zero there")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, options.overrides)
    steps = options.steps or recipe.train.steps
    modality = find("modalities", recipe.modality.name)(**recipe.modality.options)
    data = {
        split: modality.examples(recipe.data.options, length=recipe.data.length, split=split)
        for split in ("train", "validation", "holdout")
    }
    source = Source.of(recipe.data.options)
    shares = {"holdout": source.holdout, "validation": source.validation}
    characters = {
        split: sum(map(len, cut_documents(source.documents(), split, **shares))) for split in data
    }
    space, seed = modality.space, recipe.train.seed
    torch.manual_seed(int(philox.derive(seed)))
    shape = {"vocab_size": space.vocab_size, "mask_id": space.mask_id}
    model = find("backbones", recipe.model.name)(
        **recipe.model.options, **shape, max_length=recipe.data.length, causal=True
    ).train()
    made = optimizers(model, recipe.optim)
    parameters = dict(model.named_parameters())
    averaged = AveragedWeights(parameters, decay=recipe.train.ema) if recipe.train.ema else None
    best, kept, begun = math.inf, weights_of(model, averaged), time.perf_counter()
    best_step = 0
    curve = []
    for number in range(1, steps + 1):
        rate = rate_at(number, steps=steps, settings=recipe.optim)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
        rows, epochs = rows_of_step(
            number, batch_size=recipe.train.batch_size, rows=len(data["train"]), seed=seed
        )
        torch.manual_seed(int(philox.derive(seed, number)))
        loss = step(model, made, data["train"].batch(rows, epochs).tokens, space.mask_id, recipe)
        if averaged is not None:
            averaged.update(parameters, step=number)
        if number % CHECK_EVERY == 0 or number == steps:
            weights = weights_of(model, averaged)
            with Swapped(model, weights):
                found = bits(
                    nats(model, data["validation"], space.mask_id), characters["validation"]
                )
            curve.append({"step": number, "train_nats": loss, "validation_bits_per_char": found})
            print(f"step {number}  loss {loss:.4f}  validation {found:.4f}", flush=True)
            if found < best:
                best, kept, best_step = found, weights, number
    seconds = time.perf_counter() - begun
    with Swapped(model, kept):
        held_out = bits(nats(model, data["holdout"], space.mask_id), characters["holdout"])
    print(f"held-out {held_out:.4f} bits per character")
    record("autoregressive", {
        "held_out_bits_per_char": held_out,
        "validation_bits_per_char": best,
        "best_step": best_step,
        "steps": steps,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_at_best": best_step * recipe.train.batch_size * recipe.data.length,
        "recipe": str(options.recipe),
        "overrides": [o for o in options.overrides if not o.startswith("data.source")],
        "curve": curve,
    })  # fmt: skip


def bits(total: float, characters: int) -> float:
    """Bits per character of nats over a whole split."""
    return total / (characters * math.log(2))


if __name__ == "__main__":
    main()
