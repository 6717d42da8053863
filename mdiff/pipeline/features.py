"""Features of items: a denoiser's hidden states, averaged over the given positions."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mdiff.denoiser import HasFeatures
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.objective import corrupt
from mdiff.pipeline.options import Model
from mdiff.schedule import MIN_TIME
from mdiff.tokens import stack

BATCH = 64
# Rows in a message.
SHOWN = 8


def features(
    model: Model, rows: Tensor | Sequence[Sequence[int]], *, mask_ratio: float = 0.0,
    layer: int | None = None, seed: int = 0, batch_size: int = BATCH,
) -> Tensor:  # fmt: skip
    """Features (N, D) float32 of rows of tokens: the mean over the given positions of each row.

    `rows` (N, L) int64, or lists of any lengths. A share `mask_ratio` of each row's given
    positions is hidden from the denoiser, exactly round(ratio n) of n by the stream (seed, row),
    as in MAGE's pre-training (Li et al. 2023, section 3.1). `layer` is the block whose hidden
    states are taken, None the input of the head. A position that a row leaves hidden is in no
    mean. A denoiser that uses the time gets the one at which that share is hidden; no denoiser
    gets a condition.

    Raises ConfigError for a ratio outside [0, 1], an unknown layer or a denoiser without
    features; DataError for a row without a given position.
    """
    if isinstance(mask_ratio, bool) or not 0 <= mask_ratio <= 1:
        raise ConfigError(f"mask_ratio={mask_ratio}: expected 0 to 1")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: need at least 1")
    states = _hidden_states(model, layer)
    space, device = model.space, model.device
    found = []
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        ids, valid = stack(some.tolist() if isinstance(some, Tensor) else some, space=space)
        tokens, valid = ids.to(device), None if valid is None else valid.to(device)
        given = tokens != space.mask_id
        given = given if valid is None else given & valid
        count = given.sum(1)
        if not bool((count > 0).all()):
            raise DataError(f"row {first + int(count.argmin())} gives no token: all are hidden")
        t = model.schedule.time_at(torch.full_like(count, mask_ratio, dtype=torch.float64))
        noisy = corrupt(
            tokens, t, space=space, schedule=model.schedule, may_hide=given,
            count=(mask_ratio * count).round().long(), seed=seed,
            sample=torch.arange(first, first + len(tokens), device=device),
        )  # fmt: skip
        time = {"t": t.clamp(min=MIN_TIME).float()} if model.denoiser.uses_time else {}
        with torch.no_grad():
            each = states(noisy, valid=valid, **time).float()
        weight = given[..., None] / count[:, None, None]
        found.append((torch.where(given[..., None], each, 0.0) * weight).sum(1).cpu())
    if not found:
        raise DataError("there are no items to take features of")
    return _finite(torch.cat(found))


def encoded(model: Model, items: Sequence[object]) -> list[list[int]]:
    """The tokens of items; of a mapping the canvas of what it gives, the rest hidden."""
    return [
        model.modality.canvas(item) if isinstance(item, Mapping) else model.modality.encode(item)
        for item in items
    ]


def features_at(model: Model, tokens: Tensor, *, at: Tensor, layer: int | None = None) -> Tensor:
    """The features (N, D) at the positions `at` (B, L) bool of tokens (B, L), row-major."""
    return _finite(_hidden_states(model, layer)(tokens, at=at))


def _finite(found: Tensor) -> Tensor:
    """The features (N, D) where all are finite, else CheckpointError."""
    bad = (~found.isfinite().all(1)).nonzero()[:, 0]
    if len(bad):
        raise CheckpointError(
            f"the features of rows {bad[:SHOWN].tolist()} are not finite: the weights are damaged, "
            "or their type overflows (try dtype='float32')"
        )
    return found


def _hidden_states(model: Model, layer: int | None) -> Callable[..., Tensor]:
    """The denoiser's `features`, of a layer; ConfigError for a denoiser without."""
    if not isinstance(model.denoiser, HasFeatures):
        raise ConfigError(f"{type(model.denoiser).__name__} has no features to show")
    states: Callable[..., Tensor] = model.denoiser.features
    # A denoiser without layers need not take the argument.
    return states if layer is None else partial(states, layer=layer)
