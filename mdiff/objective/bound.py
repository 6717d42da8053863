"""The bound on -log p of rows of tokens, by draws or exactly; see `nll_bound`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser, block_length_of, finished_blocks
from mdiff.errors import CheckpointError, ConfigError
from mdiff.kernels import philox
from mdiff.objective.corruption import corrupt, maskable_positions
from mdiff.objective.diffusion import Terms, with_noise
from mdiff.objective.nll import Inputs, hidden_loss
from mdiff.process import Process, noise_in_force
from mdiff.schedule import Schedule
from mdiff.tokens import TokenSpace, ranks

# The exact chain rule calls the denoiser on every subset of the positions: at most 2^16.
EXACT_POSITIONS = 16
# Rows in a message.
SHOWN = 8


class Bound(NamedTuple):
    """`nats` (B,) float64, an estimate of the bound of each row; `stderr` (B,), its error."""

    nats: Tensor
    stderr: Tensor


def nll_bound(
    denoiser: Denoiser,
    tokens: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule,
    estimator: str = "any_order",
    draws: int = 64,
    seed: int,
    may_hide: Tensor | None = None,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    sample: Tensor | None = None,
    process: Process | None = None,
) -> Bound:
    """The bound on -log p in nats of each row of `tokens` (B, L), given what is not maskable.

    estimator: "any_order" draws k uniform in 1..L (L the maskable positions of the row), hides
    exactly k and weighs L / k (Uria et al. 2014, eq. 5; Nie et al. 2025, eq. 6); refused where
    the denoiser uses the time. "time" draws m = u^2, t = time_at(m) and weighs 2 / u: the
    time integral by importance in m. "exact" is the chain rule averaged over all orders, for
    at most 16 positions. "left_to_right" is the exact likelihood of that sampler: not this bound,
    but one term of its average. "random_order" is that of one order of each row, by its stream.

    `draws` is read by the first two only; the standard error is over them (0 for the others).
    Row b is hidden by the stream (seed, sample[b]), sample being 0..B-1 by default, so that a
    row's estimate does not depend on its batch. A row without maskable positions scores 0.
    No gradient is kept.

    Of a block model the bound is the sum over its blocks of the bound of each, given those
    before (Arriola et al. 2025, eq. 8); those after are cut off. A block has draws of its own,
    and "exact" takes at most 16 positions in each.

    With a `process` other than `Masking`, whose schedule stands in for `schedule`, "time" is the
    only estimator: m = u^2 again, and every position is noised and scored (`diffusion_loss`).

    Raises ConfigError for an unknown estimator, draws < 2, or an estimator that does not apply, and
    for a block model with such a process; CheckpointError where a row's bound is not finite.
    """
    maskable = maskable_positions(tokens, space=space, may_hide=may_hide, valid=valid)
    schedule, process = noise_in_force(schedule, process)
    score = _Scorer(denoiser, tokens, space=space, valid=valid, cond=cond, process=process)
    sample = torch.arange(len(tokens), device=tokens.device) if sample is None else sample
    nats, variance = torch.zeros(2, len(tokens), dtype=torch.float64, device=tokens.device)
    with torch.no_grad():
        for number, block in _own_blocks(denoiser, maskable, valid):
            score.hide_in_block(number)
            part = _bound_of(
                score, block, schedule=schedule, estimator=estimator, draws=draws,
                seed=int(philox.derive(seed, 0, number)) if number else seed, sample=sample,
            )  # fmt: skip
            nats, variance = nats + part.nats, variance + part.stderr**2
    bad = (~(nats + variance).isfinite()).nonzero()[:, 0]
    if len(bad):
        raise CheckpointError(
            f"the bound of rows {sample[bad][:SHOWN].tolist()} is not finite: the weights are "
            "damaged, their type overflows (try dtype='float32'), or a token has probability 0"
        )
    return Bound(nats, variance.sqrt())


def _own_blocks(
    denoiser: Denoiser, maskable: Tensor, valid: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Each block of a block model with its maskable positions (B, L); else all are one block.

    Blocks are runs of valid positions, as the model counts them.
    """
    length = block_length_of(denoiser)
    if length is None:
        yield 0, maskable
        return
    block = torch.where(maskable, ranks(maskable, valid) // length, -1)
    # Without maskable positions one empty block is left, so that what does not apply is refused.
    for number in sorted(set(block[maskable].tolist())) or [0]:
        yield number, block == number


def _bound_of(
    score: _Scorer, maskable: Tensor, *, schedule: Schedule, estimator: str, draws: int,
    seed: int, sample: Tensor,
) -> Bound:  # fmt: skip
    """The bound of the `maskable` positions (B, L), the others given; see `nll_bound`."""
    denoiser, tokens = score.denoiser, score.tokens
    if score.process is not None and estimator != "time":
        raise ConfigError(
            f"estimator={estimator!r}: a bound of noise that writes random tokens is measured by "
            "'time' alone"
        )
    if score.process is not None and score.length is not None:
        raise ConfigError("a block model has no bound under noise that writes random tokens")
    if estimator in ("any_order", "time"):
        if draws < 2:
            raise ConfigError(f"draws={draws}: need at least 2 for a standard error")
        if estimator == "any_order" and denoiser.uses_time:
            raise ConfigError("this denoiser uses the time: take estimator='time'")
        values = torch.stack([
            _draw_of(
                estimator, score, maskable, schedule=schedule, seed=seed, sample=sample, step=step
            )
            for step in range(draws)
        ])  # fmt: skip
        return Bound(values.mean(0), values.std(0) / math.sqrt(draws))
    if estimator not in ("exact", "left_to_right", "random_order"):
        raise ConfigError(
            f"estimator={estimator!r}: expected any_order, time, exact, left_to_right or "
            "random_order"
        )
    if denoiser.uses_time:
        raise ConfigError("this denoiser uses the time: take estimator='time'")
    nats = tokens.new_zeros(tokens.shape[0], dtype=torch.float64)
    if estimator == "random_order":
        for scored, hidden in _in_turn(_shuffled(maskable, seed, sample)):
            nats += score(hidden, scored=scored).sum(1)
    elif estimator == "exact":
        for weights, hidden in _all_orders(maskable):
            nats += (weights * score(hidden)).sum(1)
    else:
        for scored, hidden in _in_turn(_turns(maskable)):
            nats += (scored * score(hidden)).sum(1)
    return Bound(nats, torch.zeros_like(nats))


class _Scorer:
    """-log p of the clean tokens at hidden positions, for one batch of rows.

    A block model that can cache finished blocks runs on one block at a time.
    """

    def __init__(
        self, denoiser: Denoiser, tokens: Tensor, *, space: TokenSpace, valid: Tensor | None,
        cond: Condition | None, process: Process | None,
    ) -> None:  # fmt: skip
        self.denoiser, self.tokens, self.space = denoiser, tokens, space
        self.process = process
        self.inputs: Inputs = {"valid": valid, "cond": cond}
        self.columns = slice(None)
        self.length = block_length_of(denoiser)
        self.finished = None
        if self.length is not None and not space.parts:
            self.finished = finished_blocks(denoiser, valid=valid, cond=cond)

    def hide_in_block(self, block: int) -> None:
        """From here on only positions of this block are hidden; those before it are cached."""
        if self.finished is not None and self.length is not None:
            start = block * self.length
            self.columns = slice(start, start + self.length)
            self.inputs = {"cache": self.finished.before(self.tokens, start)}

    def __call__(
        self, hidden: Tensor, t: Tensor | None = None, *, scored: Tensor | None = None
    ) -> Tensor:
        """(B, L) float64 nats, 0 where not `scored`, by default all hidden positions."""
        noisy = torch.where(hidden, self.space.mask_id, self.tokens)
        scored = hidden if scored is None else scored
        nats = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
        if bool(scored.any()):
            inputs: Inputs = {**self.inputs, "t": t if self.denoiser.uses_time else None}
            _, nll = hidden_loss(
                self.denoiser, noisy[:, self.columns], self.tokens[:, self.columns],
                scored[:, self.columns], space=self.space, **inputs,
            )  # fmt: skip
            nats[scored] = nll.double()
        return nats

    def noised(
        self, process: Process, m: Tensor, maskable: Tensor, *, seed: Tensor, sample: Tensor
    ) -> Tensor:
        """(B,) float64 nats of the maskable positions at the levels m (B,) of noise."""
        noisy = with_noise(
            self.tokens, m, space=self.space, process=process, maskable=maskable, seed=seed,
            sample=sample,
        )  # fmt: skip
        t = process.schedule.time_at(m).float() if self.denoiser.uses_time else None
        inputs: Inputs = {**self.inputs, "t": t}
        terms = Terms(
            self.denoiser, noisy, self.tokens, maskable, m, space=self.space, process=process,
            **inputs,
        )  # fmt: skip
        nats = torch.zeros(maskable.shape, dtype=torch.float64, device=maskable.device)
        return nats.masked_scatter(maskable, terms.scaled * terms.nats).sum(1)


def _draw_of(
    estimator: str, score: _Scorer, maskable: Tensor, *, schedule: Schedule, seed: int,
    sample: Tensor, step: int,
) -> Tensor:  # fmt: skip
    """Draw number `step` of "any_order" or "time", (B,) nats."""
    u = philox.uniform(seed, 0, sample, step, purpose=philox.TIME)
    if score.process is not None:
        step_seed = philox.derive(seed, step)
        return score.noised(score.process, u**2, maskable, seed=step_seed, sample=sample) * 2 / u
    t, count, factor, divisor = schedule.time_at(u**2), None, torch.full_like(u, 2), u
    if estimator == "any_order":
        factor = maskable.sum(1)
        count = divisor = (u * factor).floor().long() + 1
    noisy = corrupt(
        score.tokens, t, space=score.space, schedule=schedule, may_hide=maskable, count=count,
        seed=philox.derive(seed, step), sample=sample,
    )  # fmt: skip
    hidden = (noisy == score.space.mask_id) & maskable
    return score(hidden, t.float()).sum(1) * factor / divisor


def _all_orders(maskable: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every non-empty hidden subset with the share of the L! orders that meet each position in it.

    When a position of a hidden set of size k is revealed next, (k - 1)! (L - k)! orders agree.
    """
    number = maskable.sum(1)
    most = int(number.max()) if number.numel() else 0
    if most > EXACT_POSITIONS:
        raise ConfigError(
            f"{most} maskable positions: the exact bound takes at most {EXACT_POSITIONS}"
        )
    rank = _turns(maskable)
    for size in range(1, most + 1):
        share = torch.tensor(
            [
                0.0 if n < size
                else math.factorial(size - 1) * math.factorial(n - size) / math.factorial(n)
                for n in number.tolist()
            ],
            dtype=torch.float64, device=maskable.device,
        )  # fmt: skip
        for subset in combinations(range(most), size):
            members = torch.tensor(subset, device=maskable.device)
            fits = (number > subset[-1])[:, None]
            yield (share[:, None] * fits), torch.isin(rank, members) & fits


def _turns(maskable: Tensor) -> Tensor:
    """The number (B, L) of each maskable position among those of its row, -1 elsewhere."""
    return torch.where(maskable, maskable.cumsum(1) - 1, -1)


def _shuffled(maskable: Tensor, seed: int, sample: Tensor) -> Tensor:
    """The same in a random order of each row, by its stream."""
    u = philox.uniform(seed, _turns(maskable), sample[:, None], 0, purpose=philox.ORDER)
    order = u.masked_fill(~maskable, torch.inf).argsort(dim=1, stable=True)
    return torch.where(maskable, order.argsort(1), -1)


def _in_turn(turn: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each number in turn: which position has it, and which have it or a later one."""
    for number in range(int(turn.max()) + 1):
        yield turn == number, turn >= number
