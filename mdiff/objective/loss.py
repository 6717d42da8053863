"""The one objective: hide each token with probability m(t), predict the clean ones.

Every sum is over hidden positions; the mask, `never` ids and ids outside a part have
probability zero, and a position that is not hidden costs nothing (SUBS, Sahoo et al. 2024,
section 3.2.3).
"""

from collections.abc import Callable
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser, block_length_of
from mdiff.errors import ConfigError
from mdiff.objective.corruption import corrupt, maskable_positions, stratified_times
from mdiff.objective.nll import hidden_loss
from mdiff.schedule import Schedule
from mdiff.tokens import TokenSpace

Weight = str | Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """`value` scalar; `nll` (B, L) unweighted nats, 0 where not hidden; `hidden` (B, L) bool.

    Only the value has a graph.
    """

    value: Tensor
    nll: Tensor
    hidden: Tensor


class GlobalBatch(TypedDict, total=False):
    """The rows of this call within the global batch; see `masked_diffusion_loss`."""

    t: Tensor | None
    sample: Tensor | None
    rows: int | None
    total: Tensor | float | None


def masked_diffusion_loss(
    denoiser: Denoiser,
    tokens: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule,
    may_hide: Tensor | None = None,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    cond: Condition | None = None,
    weight: Weight = "bound",
    label_smoothing: float = 0.0,
    seed: int | Tensor,
    **batch: Unpack[GlobalBatch],
) -> Loss:
    """The training loss: sum of w(t) * (-log p) over hidden positions, divided by `total`.

    With weight="bound", w = m' / m and `total` the maskable tokens, its expectation is the
    continuous-time bound in nats a maskable token (Shi et al. 2024, eq. 4; Sahoo et al. 2024,
    eq. 10). weight="uniform" is w = 1; with `total` the hidden tokens that is MaskGIT's loss
    (Chang et al. 2022, eq. 1). A function of t (B,) gives any other weight.

    `tokens` (B, L) int64 without masks. Positions that may be hidden ("maskable") are those in
    `may_hide` and in `valid` that hold no `never` id: the rest (a given prefix, padding) is
    never hidden, never scored and not counted. With `documents` (B, L) int64 packed documents
    do not attend to each other.
    `t` (B,) are times; by default stratified over the global batch of `rows` rows, of which
    this call holds the rows numbered `sample` (B,): one time in each of `rows` equal strata,
    strata permuted by the seed, so that each row's own time is uniform. `total` is the
    denominator of the global batch, by default the maskable tokens of this call. With
    `rows`, `sample` and `total` of the global batch, values of parts add up to the whole's.
    Label smoothing spreads over permitted ids only; `nll` is without it. Of a denoiser that is its
    `features` and a `head` the logits never exist all at once (`ops.masked_cross_entropy`).

    Raises ConfigError for an unknown weight, smoothing outside [0, 1), or a block model, whose
    bound is another: that of each block given clean ones before it.
    """
    refuse_blocks(denoiser)
    weigh = weight_function(weight, schedule)
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing}: expected 0 up to less than 1")
    maskable = maskable_positions(tokens, space=space, may_hide=may_hide, valid=valid)
    t, sample, total = global_batch(maskable, seed=seed, **batch)
    noisy = corrupt(
        tokens, t, space=space, schedule=schedule, may_hide=maskable, seed=seed, sample=sample
    )
    hidden = (noisy == space.mask_id) & maskable
    w = (weigh(t.double()) / total)[:, None].expand(tokens.shape)[hidden]
    value, nll = hidden_loss(
        denoiser, noisy, tokens, hidden, space=space, weights=w, smoothing=label_smoothing,
        valid=valid, documents=documents, t=t.float() if denoiser.uses_time else None, cond=cond,
    )  # fmt: skip
    spread = torch.zeros(tokens.shape, dtype=nll.dtype, device=nll.device)
    return Loss(value, spread.masked_scatter(hidden, nll), hidden)


def refuse_blocks(denoiser: Denoiser) -> None:
    """Raise ConfigError for a block model, for which `masked_diffusion_loss` is no bound."""
    length = block_length_of(denoiser)
    if length is not None:
        raise ConfigError(
            f"a block model (block_length={length}) cannot be trained here: hiding tokens of the "
            "whole row is not its objective, which has clean blocks before each noisy one"
        )


def global_batch(
    maskable: Tensor, *, seed: int | Tensor, t: Tensor | None = None, sample: Tensor | None = None,
    rows: int | None = None, total: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
    """The rows' times (B,), their numbers (B,) and the denominator, with their defaults."""
    count = len(maskable)
    sample = torch.arange(count, device=maskable.device) if sample is None else sample
    if t is None:
        t = stratified_times(sample, count if rows is None else rows, seed=seed)
    return t, sample, maskable.sum().clamp(min=1) if total is None else total


def weight_function(weight: Weight, schedule: Schedule) -> Callable[[Tensor], Tensor]:
    """The weight of a time: by name, or as it is."""
    if callable(weight):
        return weight
    if weight == "bound":
        return schedule.weight
    if weight == "uniform":
        return torch.ones_like
    raise ConfigError(f"weight={weight!r}: expected 'bound', 'uniform' or a function of t")
