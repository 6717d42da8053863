"""The objective of any noise process: where it also writes random tokens, all are scored."""

from __future__ import annotations

from typing import Unpack, cast

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser, prediction_of
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.kernels.reference import permitted_columns
from mdiff.objective.corruption import column, maskable_positions
from mdiff.objective.loss import (
    GlobalBatch,
    Loss,
    Weight,
    global_batch,
    masked_diffusion_loss,
    refuse_blocks,
    weight_function,
)
from mdiff.objective.nll import Inputs, spans_at
from mdiff.process import Ids, Masking, Mixed, Process, cost, leave_one_out
from mdiff.tokens import TokenSpace

# Some schedules round to the ends, where terms of the bound are 0 times infinity.
LEVELS = (2.0**-64, 1 - 2.0**-53)


def with_noise(
    tokens: Tensor, m: Tensor, *, space: TokenSpace, process: Process, maskable: Tensor,
    seed: int | Tensor, sample: Tensor,
) -> Tensor:  # fmt: skip
    """`tokens` (B, L) int64 at the levels m (B,) of noise, by independent coins.

    Hidden where a uniform is below the share of masks, which for masks alone is `corrupt`.
    """
    noise = process.noise(m[:, None])
    positions = torch.arange(tokens.shape[1], device=tokens.device)

    def uniform(step: int) -> Tensor:
        return philox.uniform(
            column(seed), positions, sample[:, None], step, purpose=philox.CORRUPT
        )

    coin = uniform(0)
    hide = maskable & (coin < noise.mask)
    over = maskable & ~hide & (coin < noise.mask + noise.other)
    ids = Ids.of(space, tokens.shape[1], tokens.device)
    return torch.where(hide, space.mask_id, torch.where(over, ids.chosen(uniform(1)), tokens))


class Terms:
    """Of the scored positions (N,), in row-major order: the terms of the bound.

    `nats` (N,) has the graph; `scaled` times it, summed and weighted by w(t) of the schedule, is
    the bound (`m` times the weight of `process.cost`), and `weight` is that weight in t.
    `posterior` (N,) is -log P(x | z).
    """

    def __init__(
        self, denoiser: Denoiser, noisy: Tensor, tokens: Tensor, maskable: Tensor, m: Tensor, *,
        space: TokenSpace, process: Process, **inputs: Unpack[Inputs],
    ) -> None:  # fmt: skip
        self.predicts = prediction_of(denoiser)
        logits = denoiser(noisy, at=maskable, **inputs)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        allowed = permitted_columns(logits, space.forbidden, spans_at(space, maskable))
        log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(1)
        self.x, self.z = tokens[maskable], noisy[maskable]
        self.posterior = -log_p.gather(1, self.x[:, None])[:, 0]
        self.m = m[:, None].expand_as(tokens)[maskable]
        noise = process.noise(self.m)
        count = Ids.of(space, tokens.shape[1], tokens.device).number.expand_as(tokens)[maskable]
        if self.predicts == "posterior":
            log_p = leave_one_out(log_p, self.z, noise, count, mask_id=space.mask_id)
        self.weight, self.nats = cost(
            log_p, self.x, self.z, (noise, process.slope(self.m)), count, mask_id=space.mask_id
        )
        self.scaled = self.weight * self.m


class LossOptions(GlobalBatch, total=False):
    """Options beside the batch's; see `diffusion_loss`."""

    max_weight: float | None
    label_smoothing: float


def diffusion_loss(
    denoiser: Denoiser,
    tokens: Tensor,
    *,
    space: TokenSpace,
    process: Process,
    may_hide: Tensor | None = None,
    valid: Tensor | None = None,
    documents: Tensor | None = None,
    cond: Condition | None = None,
    weight: Weight = "bound",
    seed: int | Tensor,
    **options: Unpack[LossOptions],
) -> Loss:
    """The training loss of any noise process; of `Masking` it is `masked_diffusion_loss`.

    Every maskable position is noised, predicted and scored, and `hidden` of the result are all of
    them. With weight="bound" the expectation is the continuous-time bound in nats a maskable
    token (von Rütte et al. 2025, eq. 14, with its KL and ratio terms), the prediction read as the
    denoiser's `predicts` says; `nll` times the schedule's w(t) is the bound of a position.
    `max_weight` clips the weight of each position (their "clip"), weight="dynamic" takes theirs,
    "uniform" leaves w(t) out, and a function of t (B,) stands in for w(t). weight="cross_entropy"
    is -log P(x | z) at every position, which trains a model that predicts the posterior.

    All else as in `masked_diffusion_loss`. Raises ConfigError as it does, for a denoiser that
    does not say what it predicts, and for "cross_entropy" where that is "leave_one_out".
    """
    max_weight = options.pop("max_weight", None)
    smoothing = options.pop("label_smoothing", 0.0)
    batch = cast(GlobalBatch, options)
    if max_weight is not None and not max_weight > 0:
        raise ConfigError(f"max_weight={max_weight}: expected a number above 0")
    if isinstance(process, Masking):
        schedule = process.schedule
        if max_weight is not None:
            weigh, most = weight_function(weight, schedule), max_weight
            weight = lambda t: weigh(t).clamp(max=most)  # noqa: E731
        return masked_diffusion_loss(
            denoiser, tokens, space=space, schedule=schedule, may_hide=may_hide, valid=valid,
            documents=documents, cond=cond, weight=weight, label_smoothing=smoothing, seed=seed,
            **batch,
        )  # fmt: skip
    if smoothing:
        raise ConfigError("label_smoothing is of masks: no bound of other noise has it")
    refuse_blocks(denoiser)
    maskable = maskable_positions(tokens, space=space, may_hide=may_hide, valid=valid)
    t, sample, total = global_batch(maskable, seed=seed, **batch)
    m = process.schedule.mask_prob(t.double()).clamp(*LEVELS)
    noisy = with_noise(
        tokens, m, space=space, process=process, maskable=maskable, seed=seed, sample=sample
    )
    terms = Terms(
        denoiser, noisy, tokens, maskable, m, space=space, process=process, valid=valid,
        documents=documents, t=t.float() if denoiser.uses_time else None, cond=cond,
    )  # fmt: skip
    scaled = terms.scaled.to(terms.nats.dtype) * terms.nats
    times = t[:, None].expand_as(tokens)[maskable]
    value = _value(terms, times, weight, max_weight, process=process, space=space) / total
    spread = torch.zeros(tokens.shape, dtype=scaled.dtype, device=scaled.device)
    return Loss(value, spread.masked_scatter(maskable, scaled.detach()), maskable)


def _value(
    terms: Terms, t: Tensor, weight: Weight, max_weight: float | None, *, process: Process,
    space: TokenSpace,
) -> Tensor:  # fmt: skip
    """The weighted sum of the terms at positions of the times t (N,)."""
    nats = terms.nats
    if weight == "cross_entropy":
        if terms.predicts != "posterior":
            raise ConfigError(
                "weight='cross_entropy' trains the posterior: this model says it predicts "
                f"{terms.predicts!r}"
            )
        nats, weights = terms.posterior, torch.ones_like(terms.m)
    elif weight == "dynamic":
        weights = dynamic_weight(terms, process, space=space)
    else:
        weights = weight_function(weight, process.schedule)(t.double()) * terms.scaled
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    return (weights.to(nats.dtype) * nats).sum()


def dynamic_weight(terms: Terms, process: Process, *, space: TokenSpace) -> Tensor:
    """The weights (N,) of GIDD's training: 2 at masks, 1 at wrong tokens, little at right ones.

    B / V exp(gamma / 2 sigmoid(-t)) there, as the published code has it (the paper has the
    log-SNR, not the sigmoid). Raises ConfigError for a process other than `Mixed`.
    """
    if not isinstance(process, Mixed):
        raise ConfigError("weight='dynamic' is that of process 'mixed'")
    size = process.size / (space.permitted + 1)
    t = process.schedule.time_at(terms.m)
    right = size * torch.exp(process.gamma / 2 * torch.sigmoid(-t))
    hidden, same = terms.z == space.mask_id, terms.z == terms.x
    return torch.where(hidden, 2.0, torch.where(same, right, 1.0))
