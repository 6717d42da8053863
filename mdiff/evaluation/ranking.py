"""Which of several candidates for a part of a canvas fits what is given best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.modalities import HasParts
from mdiff.objective import nll_bound
from mdiff.pipeline import Pipeline


def rank(
    pipeline: Pipeline,
    given: Mapping[str, Any],
    candidates: Sequence[Any],
    *,
    part: str,
    draws: int = 16,
    seed: int = 0,
    against_prior: bool = True,
    batch_size: int = 32,
) -> Tensor:
    """How well each candidate for `part` fits, (N,) float64 nats, higher is better.

    The score is minus the bound on -log p(candidate | given), every candidate with the same
    places hidden, so that their differences are much surer than their values. `against_prior`
    adds the bound with nothing given: log p(candidate | given) / p(candidate), which does not
    prefer a candidate for being short or common. So {"image": picture} and part="caption" name
    a picture, {"caption": "squid"} and part="image" find one.

    Raises ConfigError for a model without that part or fewer than 2 draws, DataError for what
    does not fit the canvas.
    """
    if not candidates:
        raise ConfigError("candidates: need at least 1")
    modality = pipeline.modality
    if not isinstance(modality, HasParts):
        raise ConfigError(f"this is a model of {modality.name}: its canvas has no parts")
    where = modality.span(part)
    if part in given:
        raise ConfigError(f"{part} is given: there is nothing to choose")
    rows = torch.tensor([modality.canvas({**given, part: each}) for each in candidates])
    score = -_nats(pipeline, rows, where, draws=draws, seed=seed, batch_size=batch_size)
    if against_prior:
        alone = torch.full_like(rows, pipeline.space.mask_id)
        alone[:, where] = rows[:, where]
        score += _nats(pipeline, alone, where, draws=draws, seed=seed, batch_size=batch_size)
    return score


def _nats(
    pipeline: Pipeline, rows: Tensor, where: slice, *, draws: int, seed: int, batch_size: int
) -> Tensor:
    """The bound of the places `where` of each row (N, L), in one stream of masks for all."""
    found = []
    for some in torch.split(rows, batch_size):
        may_hide = torch.zeros_like(some, dtype=torch.bool)
        may_hide[:, where] = True
        bound = nll_bound(
            pipeline.denoiser, some.to(pipeline.device), space=pipeline.space,
            schedule=pipeline.schedule, draws=draws, seed=seed,
            estimator="time" if pipeline.denoiser.uses_time else "any_order",
            may_hide=may_hide.to(pipeline.device),
            sample=torch.zeros(len(some), dtype=torch.int64, device=pipeline.device),
        )  # fmt: skip
        found.append(bound.nats.cpu())
    return torch.cat(found)
