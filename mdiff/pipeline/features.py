"""Features of whole items: a denoiser's hidden states, averaged over the given positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.objective import corrupt
from mdiff.schedule import MIN_TIME
from mdiff.tokens import stack

if TYPE_CHECKING:
    from mdiff.pipeline.pipeline import Pipeline

BATCH = 64


def features(
    pipeline: Pipeline,
    rows: Tensor | Sequence[Sequence[int]],
    *,
    mask_ratio: float = 0.0,
    layer: int | None = None,
    seed: int = 0,
    batch_size: int = BATCH,
) -> Tensor:
    """Features (N, D) float32 of rows of tokens: the mean over the places that a row gives.

    `rows` (N, L) int64, or lists of any lengths. A share `mask_ratio` of each row's given
    places is hidden from the denoiser, exactly round(ratio n) of n by the stream (seed, row), as
    in MAGE's pre-training (Li et al. 2023, section 3.1). `layer` is the block whose stream is
    shown, None what the head reads. A place that a row leaves hidden is in no mean. A denoiser
    that uses the time is told the one at which that share is hidden; none gets a condition.

    Raises ConfigError for a ratio outside [0, 1], a layer that there is not or a denoiser that
    shows no features; DataError for a row that gives nothing.
    """
    if isinstance(mask_ratio, bool) or not 0 <= mask_ratio <= 1:
        raise ConfigError(f"mask_ratio={mask_ratio}: expected 0 to 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: need at least 1")
    shown = _shown(pipeline)
    space, device = pipeline.space, pipeline.device
    told: dict[str, Any] = {} if layer is None else {"layer": layer}
    found = []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        ids, valid = stack(some.tolist() if isinstance(some, Tensor) else some, space=space)
        tokens, valid = ids.to(device), None if valid is None else valid.to(device)
        given = tokens != space.mask_id
        given = given if valid is None else given & valid
        count = given.sum(1)
        if not bool((count > 0).all()):
            raise DataError(f"row {first + int(count.argmin())} gives nothing: all is hidden")
        t = pipeline.schedule.time_at(torch.full_like(count, mask_ratio, dtype=torch.float64))
        noisy = corrupt(
            tokens, t, space=space, schedule=pipeline.schedule, may_hide=given,
            count=(mask_ratio * count).round().long(), seed=seed,
            sample=torch.arange(first, first + len(tokens), device=device),
        )  # fmt: skip
        if pipeline.denoiser.uses_time:
            told["t"] = t.clamp(min=MIN_TIME).float()
        with torch.no_grad():
            each = shown(noisy, valid=valid, **told).float()
        weight = given[..., None] / count[:, None, None]
        found.append((torch.where(given[..., None], each, 0.0) * weight).sum(1).cpu())
    if not found:
        raise DataError("there is nothing to show features of")
    return torch.cat(found)


def features_at(
    pipeline: Pipeline, tokens: Tensor, *, at: Tensor, layer: int | None = None
) -> Tensor:
    """The denoiser's features at the places `at` (B, L) bool of tokens (B, L), one row a place."""
    told = {} if layer is None else {"layer": layer}
    found: Tensor = _shown(pipeline)(tokens, at=at, **told)
    return found


def _shown(pipeline: Pipeline) -> Any:
    """The denoiser's `features`; ConfigError where it has none."""
    shown = getattr(pipeline.denoiser, "features", None)
    if shown is None:
        raise ConfigError(f"{type(pipeline.denoiser).__name__} has no features to show")
    return shown
