"""aMUSEd's sampler: `confidence` with counts of the whole canvas and noise that is annealed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.samplers.confidence import confidence
from mdiff.sampling import State, free_positions, schedule_counts, useful_steps
from mdiff.schedule import Cosine, Schedule, as_float64
from mdiff.tokens import TokenSpace

# The calls and the factors of the noise at the first and the last of them, as published.
STEPS, NOISE = 12, (2.0, 0.0)


@dataclass(frozen=True)
class CosineInFloat32(Cosine):
    """The cosine as its code rounds it: cos(pi / 3) falls just below 1/2, and a count with it."""

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = cos(pi (1 - t) / 2), in float32."""
        ratio = 1 - as_float64(t)
        return torch.cos(ratio.float() * math.pi / 2)


def amused(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule = CosineInFloat32(),
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    given: Tensor | None = None,
    steps: int = STEPS,
    noise: tuple[float, float] = NOISE,
) -> Iterator[State]:
    """States of the sampler that aMUSEd was published with (Patil et al. 2024).

    `confidence` with counts along `schedule` of all valid positions of `canvas` (B, L), given
    ones too, so that a sample with given tokens may need fewer calls than `steps`; its Gumbel
    noise has a factor that goes evenly from `noise[0]` at the first step to `noise[1]` at the
    last. The guidance that goes with it is guidance_scale=10. As of `confidence`, the law is not
    that of the ideal denoiser at one reveal a call either: a position depends on its drawn token.

    Source: huggingface/diffusers 0.42 (2026), `AmusedPipeline` and `AmusedScheduler`.

    Raises ConfigError for steps < 1, and as `confidence` does.
    """
    if len(noise) != 2:
        raise ConfigError(f"noise={noise}: expected two numbers")
    space.check(canvas, valid)
    counted = torch.ones_like(canvas, dtype=torch.bool) if valid is None else valid
    free = free_positions(canvas, given, valid, mask_id=space.mask_id)
    hidden = (free & (canvas == space.mask_id)).sum(1)
    steps = useful_steps(steps, hidden)
    counts = schedule_counts(hidden, steps=steps, schedule=schedule, of=counted.sum(1))
    yield from confidence(
        denoiser, canvas, space=space.checked(), schedule=schedule, seed=seed, valid=valid,
        cond=cond, given=given, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        counts=counts, noise=torch.linspace(*noise, steps, dtype=torch.float32, device="cpu"),
    )  # fmt: skip
