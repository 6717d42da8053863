"""The one objective: hide each token with probability m(t), predict the clean ones.

Every sum is over hidden places; the mask, `never` ids and ids outside a part have
probability zero, and a place that is not hidden costs nothing (SUBS, Sahoo et al. 2024,
section 3.2.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdiff.block_cache import FinishedBlocks, can_keep
from mdiff.denoiser import Condition, Denoiser, own_head
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.kernels.loss import CrossEntropy, row_nll
from mdiff.ops import masked_cross_entropy
from mdiff.schedule import MIN_TIME, Schedule
from mdiff.tokens import TokenSpace, ranks

# The exact chain rule visits every subset of the places: 2^16 is where patience ends.
EXACT_PLACES = 16

Weight = str | Callable[[Tensor], Tensor]


class Loss(NamedTuple):
    """`value` scalar; `nll` (B, L) unweighted nats, 0 where not hidden; `hidden` (B, L) bool.

    Only the value has a graph.
    """

    value: Tensor
    nll: Tensor
    hidden: Tensor


class Bound(NamedTuple):
    """`nats` (B,) float64, an estimate of the bound of each row; `stderr` (B,), its error."""

    nats: Tensor
    stderr: Tensor


def corrupt(
    tokens: Tensor,
    t: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule,
    may_hide: Tensor | None = None,
    count: Tensor | None = None,
    seed: int | Tensor,
    sample: Tensor | None = None,
) -> Tensor:
    """`tokens` (B, L) int64 with places hidden: independent coins at m(t), t (B,).

    With `count` (B,) int64, exactly that many of a row's places, uniformly; t is then not
    read. `may_hide` (B, L) bool are the places that may be hidden. Row b uses the random
    stream (seed, sample[b]), sample being 0..B-1 by default.

    >>> from mdiff.schedule import Linear
    >>> space = TokenSpace(2, mask_id=2)
    >>> corrupt(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1), space=space,
    ...         schedule=Linear(), seed=0).tolist()
    [[2, 2, 2]]
    """
    rows, length = tokens.shape
    device = tokens.device
    sample = torch.arange(rows, device=device) if sample is None else sample
    places = torch.arange(length, device=device)
    coin = philox.uniform(_column(seed), places, sample[:, None], 0, purpose=philox.CORRUPT)
    if count is None:
        hide = coin < schedule.mask_prob(t.double())[:, None]
        if may_hide is not None:
            hide &= may_hide
    else:
        if may_hide is not None:
            coin = torch.where(may_hide, coin, 2.0)
            count = torch.minimum(count, may_hide.sum(1))
        hide = coin.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]
    return torch.where(hide, space.mask_id, tokens)


def token_nll(logits: Tensor, tokens: Tensor, noisy: Tensor, *, space: TokenSpace) -> Tensor:
    """-log p of the clean `tokens` where `noisy` hides them, (B, L) nats, 0 elsewhere.

    `logits` (B, L, V). At least float32 inside; float64 stays float64.
    """
    hidden = noisy == space.mask_id
    nll, _ = row_nll(
        logits[hidden], tokens[hidden], forbidden=space.forbidden, span=_spans_at(space, hidden)
    )
    return torch.zeros(tokens.shape, dtype=nll.dtype, device=nll.device).masked_scatter(hidden, nll)


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
    t: Tensor | None = None,
    weight: Weight = "bound",
    label_smoothing: float = 0.0,
    seed: int | Tensor,
    sample: Tensor | None = None,
    rows: int | None = None,
    total: Tensor | float | None = None,
) -> Loss:
    """The training loss: sum of w(t) * (-log p) over hidden places, divided by `total`.

    With weight="bound", w = m' / m and `total` the maskable tokens, its expectation is the
    continuous-time bound in nats a maskable token (Shi et al. 2024, eq. 4; Sahoo et al. 2024,
    eq. 10). weight="uniform" is w = 1; with `total` the hidden tokens that is MaskGIT's loss
    (Chang et al. 2022, eq. 1). A function of t (B,) gives any other weight.

    `tokens` (B, L) int64 without masks. Places that may be hidden ("maskable") are those in
    `may_hide` and in `valid` that hold no `never` id: the rest (a given prefix, padding) is
    never hidden, never scored and not counted. `documents` (B, L) int64 keeps packed documents
    from seeing each other.
    `t` (B,) are times; by default stratified over the global batch of `rows` rows, of which
    this call holds the rows numbered `sample` (B,): one time in each of `rows` equal strata,
    strata permuted by the seed, so that each row's own time is uniform. `total` is the
    denominator of the global batch, by default the maskable tokens of this call. With
    `rows`, `sample` and `total` of the global batch, values of parts add up to the whole's.
    Label smoothing spreads over permitted ids only; `nll` is without it. Of a denoiser that is
    its `features` and a `head` the logits are never held whole (`ops.masked_cross_entropy`).

    Raises ConfigError for an unknown weight or smoothing outside [0, 1).
    """
    weigh = _weight_function(weight, schedule)
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing}: expected 0 up to less than 1")
    batch = tokens.shape[0]
    sample = torch.arange(batch, device=tokens.device) if sample is None else sample
    if t is None:
        t = stratified_times(sample, batch if rows is None else rows, seed=seed)
    maskable = maskable_places(tokens, space=space, may_hide=may_hide, valid=valid)
    noisy = corrupt(
        tokens, t, space=space, schedule=schedule, may_hide=maskable, seed=seed, sample=sample
    )
    hidden = (noisy == space.mask_id) & maskable
    if total is None:
        total = maskable.sum().clamp(min=1)
    w = (weigh(t.double()) / total)[:, None].expand(tokens.shape)[hidden]
    value, nll = _hidden_loss(
        denoiser, noisy, tokens, hidden, space=space, weights=w, smoothing=label_smoothing,
        valid=valid, documents=documents, t=t.float() if denoiser.uses_time else None, cond=cond,
    )  # fmt: skip
    spread = torch.zeros(tokens.shape, dtype=nll.dtype, device=nll.device)
    return Loss(value, spread.masked_scatter(hidden, nll), hidden)


def maskable_places(
    tokens: Tensor,
    *,
    space: TokenSpace,
    may_hide: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The places of `tokens` (B, L) that may be hidden and are scored, (B, L) bool.

    Those in `may_hide` and in `valid` whose token can be generated: `never` ids are given.
    """
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    for mask in (may_hide, valid):
        if mask is not None:
            maskable = maskable & mask
    for token in space.never:
        maskable = maskable & (tokens != token)
    return maskable


def stratified_times(sample: Tensor, rows: int, *, seed: int | Tensor) -> Tensor:
    """Times (B,) float64 of rows `sample` of a global batch of `rows`: one in each stratum.

    Row r gets (p(r) + u(r)) / rows, p a permutation and u uniforms by the seed; each is
    uniform on (0, 1), and the batch covers [0, 1] evenly (Kingma et al. 2021, appendix I.1).
    """
    everyone = torch.arange(rows, device=sample.device)
    order = philox.uniform(seed, everyone, 0, 0, purpose=philox.STRATUM).argsort(stable=True)
    stratum = torch.empty_like(order)
    stratum[order] = everyone
    inside = philox.uniform(seed, 0, sample, 0, purpose=philox.TIME)
    return ((stratum[sample] + inside) / rows).clamp(MIN_TIME, 1.0)


def truncated_normal(u: Tensor, *, mean: float, std: float, low: float, high: float) -> Tensor:
    """The quantiles `u` (B,) in (0, 1) of a normal cut to [low, high], (B,) float64.

    The share of hidden tokens of MAGE (Li et al. 2023, section 3.1), by inverse CDF, so that
    stratified `u` gives stratified shares. Raises ConfigError where low is not below high.
    """
    if not low < high:
        raise ConfigError(f"low={low}, high={high}: expected low below high")
    ends = torch.tensor([low, high], dtype=torch.float64, device=u.device)
    below, upto = torch.special.ndtr((ends - mean) / std)
    inside = below + u.double() * (upto - below)
    share: Tensor = (mean + std * torch.special.ndtri(inside)).clamp(low, high)
    return share


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
) -> Bound:
    """The bound on -log p(tokens) of each row (B, L) in nats, given its places not maskable.

    estimator: "any_order" draws k uniform in 1..L (L the maskable places of the row), hides
    exactly k and weighs L / k (Uria et al. 2014, eq. 5; Nie et al. 2025, eq. 6); refused where
    the denoiser uses the time. "time" draws m = u^2, t = time_at(m) and weighs 2 / u: the
    time integral by importance in m. "exact" is the chain rule averaged over all orders, for
    at most 16 places. "left_to_right" is the exact likelihood of that sampler: not this bound,
    but one term of its average.

    `draws` is read by the first two only; the standard error is over them (0 for the others).
    Row b is hidden by the stream (seed, sample[b]), sample being 0..B-1 by default, so that a
    row's estimate does not depend on its batch. A row without maskable places scores 0. No
    gradient is kept.

    Of a block model the bound is the sum over its blocks of the bound of each, given those
    before (Arriola et al. 2025, eq. 8); it does not see those after. A block has draws of its
    own, and "exact" takes at most 16 places in each.

    Raises ConfigError for an unknown estimator, draws < 2, or an estimator that does not apply.
    """
    maskable = maskable_places(tokens, space=space, may_hide=may_hide, valid=valid)
    score = _Scorer(denoiser, tokens, space=space, valid=valid, cond=cond)
    if sample is None:
        sample = torch.arange(tokens.shape[0], device=tokens.device)
    nats, variance = torch.zeros(2, len(tokens), dtype=torch.float64, device=tokens.device)
    with torch.no_grad():
        for number, places in _own_blocks(denoiser, maskable, valid):
            score.look_at(number)
            part = _bound_of(
                score, places, schedule=schedule, estimator=estimator, draws=draws,
                seed=int(philox.derive(seed, 0, number)) if number else seed, sample=sample,
            )  # fmt: skip
            nats, variance = nats + part.nats, variance + part.stderr**2
    return Bound(nats, variance.sqrt())


def _own_blocks(
    denoiser: Denoiser, maskable: Tensor, valid: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Each block of a block model with its maskable places (B, L); else all are one block.

    Blocks are runs of valid places, as the model counts them.
    """
    length: int | None = getattr(denoiser, "block_length", None)
    if length is None:
        yield 0, maskable
        return
    block = torch.where(maskable, ranks(maskable, valid) // length, -1)
    # Without maskable places one empty block is left, so that what does not apply is refused.
    for number in sorted(set(block[maskable].tolist())) or [0]:
        yield number, block == number


def _bound_of(
    score: _Scorer, maskable: Tensor, *, schedule: Schedule, estimator: str, draws: int,
    seed: int, sample: Tensor,
) -> Bound:  # fmt: skip
    """The bound of the `maskable` places (B, L), the others given; see `nll_bound`."""
    denoiser, tokens = score.denoiser, score.tokens
    if estimator in ("any_order", "time"):
        if draws < 2:
            raise ConfigError(f"draws={draws}: need at least 2 for a standard error")
        if estimator == "any_order" and denoiser.uses_time:
            raise ConfigError("this denoiser uses the time: take estimator='time'")
        estimate = _any_order_draw if estimator == "any_order" else _time_draw
        values = torch.stack([
            estimate(score, maskable, schedule=schedule, seed=seed, sample=sample, step=step)
            for step in range(draws)
        ])  # fmt: skip
        return Bound(values.mean(0), values.std(0) / math.sqrt(draws))
    if estimator in ("exact", "left_to_right"):
        if denoiser.uses_time:
            raise ConfigError("this denoiser uses the time: take estimator='time'")
        chain = _all_orders if estimator == "exact" else _left_to_right
        nats = tokens.new_zeros(tokens.shape[0], dtype=torch.float64)
        for weights, hidden in chain(maskable):
            nats += (weights * score(hidden)).sum(1)
        return Bound(nats, torch.zeros_like(nats))
    raise ConfigError(f"estimator={estimator!r}: expected any_order, time, exact or left_to_right")


class _Scorer:
    """-log p of the clean tokens at hidden places, for one batch of rows.

    Of a block model that can keep finished blocks, it runs on one block at a time.
    """

    def __init__(
        self, denoiser: Denoiser, tokens: Tensor, *, space: TokenSpace, valid: Tensor | None,
        cond: Condition | None,
    ) -> None:  # fmt: skip
        self.denoiser, self.tokens, self.space = denoiser, tokens, space
        self.told: dict[str, Any] = {"valid": valid, "cond": cond}
        self.columns = slice(None)
        self.length: int | None = getattr(denoiser, "block_length", None)
        self.finished: FinishedBlocks | None = None
        if self.length is not None and can_keep(denoiser, valid=valid, cond=cond):
            self.finished = None if space.parts else FinishedBlocks(denoiser)

    def look_at(self, block: int) -> None:
        """Only places of this block are hidden from here on; those before it are kept."""
        if self.finished is not None and self.length is not None:
            start = block * self.length
            self.finished.grow(self.tokens, start)
            self.columns = slice(start, start + self.length)
            self.told = {"cache": self.finished.cache}

    def __call__(self, hidden: Tensor, t: Tensor | None = None) -> Tensor:
        """(B, L) float64 nats, 0 where not hidden."""
        noisy = torch.where(hidden, self.space.mask_id, self.tokens)
        nats = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
        if bool(hidden.any()):
            _, nll = _hidden_loss(
                self.denoiser, noisy[:, self.columns], self.tokens[:, self.columns],
                hidden[:, self.columns], space=self.space,
                t=t if self.denoiser.uses_time else None, **self.told,
            )  # fmt: skip
            nats[hidden] = nll.double()
        return nats


def _any_order_draw(
    score: _Scorer, maskable: Tensor, *, schedule: Schedule, seed: int, sample: Tensor, step: int
) -> Tensor:
    places = maskable.sum(1)
    u = philox.uniform(seed, 0, sample, step, purpose=philox.TIME)
    count = (u * places).floor().long() + 1
    noisy = corrupt(
        score.tokens, torch.ones_like(u), space=score.space, schedule=schedule,
        may_hide=maskable, count=count, seed=philox.derive(seed, step), sample=sample,
    )  # fmt: skip
    nats = score((noisy == score.space.mask_id) & maskable).sum(1)
    return nats * places / count


def _time_draw(
    score: _Scorer, maskable: Tensor, *, schedule: Schedule, seed: int, sample: Tensor, step: int
) -> Tensor:
    u = philox.uniform(seed, 0, sample, step, purpose=philox.TIME)
    t = schedule.time_at(u**2)
    noisy = corrupt(
        score.tokens, t, space=score.space, schedule=schedule, may_hide=maskable,
        seed=philox.derive(seed, step), sample=sample,
    )  # fmt: skip
    hidden = (noisy == score.space.mask_id) & maskable
    return score(hidden, t.float()).sum(1) * 2 / u


def _all_orders(maskable: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every non-empty hidden subset with the share of the L! orders that meet each place in it.

    When a place of a hidden set of size k is revealed next, (k - 1)! (L - k)! orders agree.
    """
    places = maskable.sum(1)
    most = int(places.max()) if places.numel() else 0
    if most > EXACT_PLACES:
        raise ConfigError(f"{most} maskable places: the exact bound takes at most {EXACT_PLACES}")
    rank = torch.where(maskable, maskable.cumsum(1) - 1, -1)
    for size in range(1, most + 1):
        share = torch.tensor(
            [
                0.0 if n < size
                else math.factorial(size - 1) * math.factorial(n - size) / math.factorial(n)
                for n in places.tolist()
            ],
            dtype=torch.float64, device=maskable.device,
        )  # fmt: skip
        for subset in combinations(range(most), size):
            members = torch.tensor(subset, device=maskable.device)
            fits = (places > subset[-1])[:, None]
            yield (share[:, None] * fits), torch.isin(rank, members) & fits


def _left_to_right(maskable: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each maskable place in turn: it and all later ones hidden, only it scored."""
    rank = torch.where(maskable, maskable.cumsum(1) - 1, -1)
    for place in range(int(maskable.sum(1).max())):
        yield (rank == place).double(), rank >= place


def _hidden_loss(
    denoiser: Denoiser,
    noisy: Tensor,
    tokens: Tensor,
    hidden: Tensor,
    *,
    space: TokenSpace,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    **told: Any,
) -> CrossEntropy:
    """The weighted sum over hidden places (N) of smoothed -log p, and -log p of each, (N,).

    The denoiser is called with `noisy` (B, L) and what it is `told`; `weights` (N,). Where it
    is its features and a head, the logits are never whole.
    """
    head, spans, targets = own_head(denoiser), _spans_at(space, hidden), tokens[hidden]
    if isinstance(head, nn.Module):
        features = denoiser.features(noisy, at=hidden, **told)  # type: ignore[attr-defined]
        return masked_cross_entropy(
            features, head, targets, weights=weights, never=space.forbidden, span=spans,
            label_smoothing=smoothing,
        )  # fmt: skip
    logits = denoiser(noisy, at=hidden, **told)
    nll, smooth = row_nll(
        logits, targets, forbidden=space.forbidden, span=spans, smoothing=smoothing
    )
    weighted = smooth if weights is None else weights.to(nll.dtype) * smooth
    return CrossEntropy(weighted.sum(), nll.detach())


def _spans_at(space: TokenSpace, hidden: Tensor) -> Tensor | None:
    """The (first, stop) ids of each hidden place, (N, 2), or None without parts."""
    spans = space.spans(hidden.shape[1], hidden.device)
    return None if spans is None else spans.expand(*hidden.shape, 2)[hidden]


def _weight_function(weight: Weight, schedule: Schedule) -> Callable[[Tensor], Tensor]:
    if callable(weight):
        return weight
    if weight == "bound":
        return schedule.weight
    if weight == "uniform":
        return torch.ones_like
    raise ConfigError(f"weight={weight!r}: expected 'bound', 'uniform' or a function of t")


def _column(seed: int | Tensor) -> int | Tensor:
    return seed[:, None] if isinstance(seed, Tensor) and seed.dim() == 1 else seed
