"""Which positions of a canvas are hidden, and at which time: all of it by a seed."""

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.schedule import MIN_TIME, Schedule
from mdiff.tokens import TokenSpace


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
    """`tokens` (B, L) int64 with positions hidden: independent coins at m(t), t (B,).

    With `count` (B,) int64, exactly that many of a row's positions, uniformly; t is then
    not read. `may_hide` (B, L) bool are the positions that may be hidden. Row b uses the random
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
    positions = torch.arange(length, device=device)
    coin = philox.uniform(column(seed), positions, sample[:, None], 0, purpose=philox.CORRUPT)
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


def maskable_positions(
    tokens: Tensor,
    *,
    space: TokenSpace,
    may_hide: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """The positions of `tokens` (B, L) that may be hidden and are scored, (B, L) bool.

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


def column(seed: int | Tensor) -> int | Tensor:
    """Seeds (B,) as a column (B, 1); one seed as it is."""
    return seed[:, None] if isinstance(seed, Tensor) and seed.dim() == 1 else seed
