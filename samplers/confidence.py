"""Confidence: draw a token at every hidden position, keep the most confident (MaskGIT, LLaDA)."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.sampling import (
    Counts,
    State,
    Unmasking,
    parallel_rule,
    positions_of_step,
    reveal_counts,
)
from mdiff.schedule import Cosine, Schedule
from mdiff.tokens import TokenSpace

SCORES = {
    "confidence": lambda drawn: drawn.log_prob,
    "entropy": lambda drawn: -drawn.entropy,
    "margin": lambda drawn: drawn.margin,
}


def confidence(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule = Cosine(),  # noqa: B008
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    given: Tensor | None = None,
    steps: int | None = None,
    counts: Counts = "schedule",
    score: str = "confidence",
    noise: float | Tensor = 0.0,
    measure: str = "model",
    threshold: float | None = None,
    factor: float | None = None,
    frechet: float | None = None,
    kl: float | None = None,
) -> Iterator[State]:
    """States of `steps` calls on `canvas` (B, L), the positions with the highest score first.

    Each call draws a token at every hidden position and keeps as many as `counts` says (see
    `sampling.reveal_counts`; `steps=None` is one a call). `score` is "confidence" (the
    log-probability of the drawn token), "entropy" (its negative) or "margin" (p1 - p2), of
    the guided logits before temperature and filters; measure="drawn" takes them after. Ties
    go to the first position. `noise` > 0 adds noise * (1 - i / steps) * Gumbel to the score at
    step i: MaskGIT's annealed choice (Chang et al. 2022, section 3.2), 4.5 in its code; a
    tensor (steps,) is the factor of each step itself. With temperature=0, counts="even" and no
    noise it is LLaDA's low-confidence remasking (Nie et al. 2025, algorithm 5).

    With a `threshold` a call also writes every position whose drawn token has at least that
    probability, whose margin is at least that, or whose entropy is at most that many nats
    (Fast-dLLM, Wu et al. 2025: 0.9 at temperature 0, `steps=None`). `factor`, `frechet`, or `kl`
    beside a threshold write by another bound, at least `counts`: see `sampling.parallel`.

    At one reveal a call, score="entropy" or "margin" without noise gives the exact law of an
    ideal denoiser; "confidence" does not, since the position depends on the drawn token.

    Raises ConfigError for an unknown score, noise, counts or bounds out of range, two of them.
    """
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, measure=measure,
    )  # fmt: skip
    table = reveal_counts(counts, fill.start, steps=steps, schedule=schedule)
    rule, least = parallel_rule(
        fill, factor=factor, frechet=frechet, kl=kl, threshold=threshold, score=score,
        least=_least(threshold, score), noisy=isinstance(noise, Tensor) or noise > 0,
    )  # fmt: skip
    per_step = None if table is None else table.tolist()
    factors = _noise_factors(noise, fill.start, None if table is None else table.shape[1])
    step = 0
    while any(fill.left):
        number = positions_of_step(fill.left, per_step, step)
        if any(number):
            count = (fill.start > step).long() if table is None else table[:, step]
            at, t = fill.hidden & (count > 0)[:, None], fill.time_left(schedule)
            every = [left * (n > 0) for left, n in zip(fill.left, number)]
            drawn = (rule or fill).ask(at, step, t, number=every)
            value = SCORES[score](drawn)
            if factors is not None:
                value = value.double() + _gumbel(fill, factors[:, step], step)
            if rule is not None:
                value, count = rule.count(at, drawn, value, count)
                number = count.tolist()
            yield fill.reveal_surest(
                at, drawn, value, t, count=count, number=number, threshold=least
            )
        step += 1


def _noise_factors(noise: float | Tensor, start: Tensor, steps: int | None) -> Tensor | None:
    """The factor of the Gumbel noise of each sample at each step, (B, steps) float64.

    None is no noise. `start` (B,) are the positions to reveal, a sample's own steps where `steps`
    is None.
    """
    device = start.device
    if isinstance(noise, Tensor):
        factors = noise.to(device=device, dtype=torch.float64)
        if factors.shape != (steps,) or not bool(((factors >= 0) & factors.isfinite()).all()):
            raise ConfigError(
                f"noise {tuple(noise.shape)}: expected a finite number >= 0 for each of "
                + ("the steps, so give steps too" if steps is None else f"{steps} steps")
            )
        return factors.expand(len(start), -1)
    if not 0 <= noise < math.inf:
        raise ConfigError(f"noise={noise}: expected a finite number >= 0")
    if noise == 0:
        return None
    step = torch.arange(1, (int(start.max()) if steps is None else steps) + 1, device=device)
    total = start.double() if steps is None else torch.full_like(start, steps).double()
    return noise * (1 - step / total[:, None]).clamp(min=0)


def _gumbel(fill: Unmasking, factor: Tensor, step: int) -> Tensor:
    """`factor` (B,) times Gumbel noise at each position of the last call, (N,) float64."""
    noise = -torch.log(-torch.log(fill.uniform(philox.NOISE, step)))
    return (factor[:, None] * noise).flatten().index_select(0, fill.positions)


def _least(threshold: float | None, score: str) -> float | None:
    """The least score that is written at once; None without a threshold."""
    if score not in SCORES:
        raise ConfigError(f"unknown score {score!r}; {nearest(score, SCORES)}")
    if threshold is None:
        return None
    if score == "entropy":
        if not 0 <= threshold < math.inf:
            raise ConfigError(f"threshold={threshold}: expected nats, at least 0")
        return -threshold
    if not 0 < threshold <= 1:
        raise ConfigError(f"threshold={threshold}: expected more than 0 and at most 1")
    return math.log(threshold) if score == "confidence" else threshold
