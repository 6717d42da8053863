"""Ranking: which of several candidates for a part of a canvas fits the given parts best."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.modalities import HasParts
from mdiff.objective import nll_bound
from mdiff.pipeline import Pipeline


def rank(
    pipeline: Pipeline, given: Mapping[str, object], candidates: Sequence[object], *, part: str,
    draws: int = 16, seed: int = 0, against_prior: bool = True, batch_size: int = 32,
) -> Tensor:  # fmt: skip
    """The score of each candidate for `part`, (N,) float64 nats, higher is better.

    The score is minus the bound on -log p(candidate | given). All candidates have the same
    hidden positions, so that differences of scores vary far less than the scores.
    `against_prior` adds the bound with nothing given, which estimates
    log p(candidate | given) / p(candidate): no preference for a short or common candidate.
    {"image": picture} with part="caption" names a picture, {"caption": "squid"} with
    part="image" finds one.

    Raises ConfigError for a model without that part or fewer than 2 draws, DataError for a
    candidate that does not fit the canvas.
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
    """The bound of the positions `where` of each row (N, L), every row with the same masks."""
    found, device = [], pipeline.device
    for some in torch.split(rows.to(device), batch_size):
        may_hide = torch.zeros_like(some, dtype=torch.bool)
        may_hide[:, where] = True
        bound = nll_bound(
            pipeline.denoiser, some, space=pipeline.space, schedule=pipeline.schedule, draws=draws,
            seed=seed, estimator=pipeline.estimator, process=pipeline.process,
            may_hide=may_hide, sample=torch.zeros(len(some), dtype=torch.int64, device=device),
        )  # fmt: skip
        found.append(bound.nats.cpu())
    return torch.cat(found)
