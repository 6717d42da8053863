"""The scaling law L = E + A / N^a + B / D^b of runs (Hoffmann et al. 2022), with intervals.

N is a number of parameters, D one of tokens, L a bound in any unit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError

# Of Huber's loss on the residuals of log L: Hoffmann et al., appendix D.3.
DELTA = 1e-3
# Where a search begins: exponents, and the share of the lowest L that E is.
EXPONENTS, SHARES = (0.1, 0.3, 0.6, 1.2), (0.5, 0.9)
MOST_EXPONENT = 4.0
ITERATIONS, MOST_DAMPING = 300, 1e9
# Two values of N are two equations for E, A and a.
FEWEST_VALUES = 3
LEVEL = 0.95


@dataclass(frozen=True)
class Scaling:
    """The fitted values by name, and an interval of each.

    `names` are E, A, a, B, b, without A, a where N is the same in all runs and without B, b where
    D is: E then holds that term. A and B are those of N and D in units of 1.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def unidentified(parameters: Sequence[float], tokens: Sequence[float]) -> str:
    """Why runs of these N and D cannot identify the law, or "".

    >>> unidentified([1e5, 1e6, 1e7, 1e8], [1e6, 1e6, 1e6, 1e6])
    ''
    >>> unidentified([1e5, 1e6, 1e7, 1e8], [1e6, 1e6, 1e6, 2e6])
    'D has 2 different values: a term of the law needs at least 3'
    """
    counts = {"N": len(set(parameters)), "D": len(set(tokens))}
    for name, count in counts.items():
        if 1 < count < FEWEST_VALUES:
            return f"{name} has {count} different values: a term of the law needs at least 3"
    unknown = 1 + 2 * sum(count > 1 for count in counts.values())
    points = len(set(zip(parameters, tokens)))
    if points <= unknown:
        return f"{points} different points (N, D) for {unknown} unknowns: need more"
    return ""


def fit_scaling(
    parameters: Sequence[float], tokens: Sequence[float], losses: Sequence[float],
    *, bootstrap: int = 400, seed: int = 0,
) -> Scaling:  # fmt: skip
    """The law of runs of N `parameters` and D `tokens` with the bounds `losses`, in log space.

    Minimises Huber's loss of log L - log(predicted L) from several starts; the intervals of 95
    percent are quantiles over `bootstrap` fits of as many runs drawn with replacement, all at
    once. Raises ConfigError where neither N nor D changes, DataError where the runs cannot
    identify the law, as `unidentified` says.
    """
    varied = [len(set(values)) > 1 for values in (parameters, tokens)]
    if not any(varied):
        raise ConfigError("neither N nor D changes: there is no scaling law to fit")
    why = unidentified(parameters, tokens)
    if why:
        raise DataError(why)
    table = torch.tensor([list(parameters), list(tokens), list(losses)], dtype=torch.float64)
    logs = table.log()
    if not bool(logs.isfinite().all()):
        raise DataError("N, D and L must be finite and above 0")
    x, y = logs[:2][varied], logs[2]
    middle = x.mean(1, keepdim=True)
    starts = _starts(y, len(x))
    found, costs = _minimised(starts, torch.ones(1, len(y), dtype=y.dtype), x - middle, y)
    best = found[costs.argmin()].expand(bootstrap, -1)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(y), (bootstrap, len(y)), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=len(y)) for row in drawn]).to(y.dtype)
    again, _ = _minimised(best, counts, x - middle, y)
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=y.dtype)
    names = ["E", *[name for pair, used in zip(("Aa", "Bb"), varied) if used for name in pair]]
    ends = _named(again, middle).quantile(tail, dim=0).T.tolist()
    return Scaling(
        dict(zip(names, _named(best, middle)[0].tolist())),
        {name: (low, high) for name, (low, high) in zip(names, ends)},
    )


def _named(found: Tensor, middle: Tensor) -> Tensor:
    """E, A, a, ... of rows log E, log A', a, ..., where A' is A at the mean of log N."""
    columns = [found[:, 0].exp()]
    for term, at in enumerate(middle[:, 0]):
        scale, power = found[:, 1 + 2 * term], found[:, 2 + 2 * term]
        columns += [(scale + power * at).exp(), power]
    return torch.stack(columns, 1)


def _starts(y: Tensor, terms: int) -> Tensor:
    """The rows that a search begins with."""
    rows = []
    for share in SHARES:
        rest = math.log(max(float(y.exp().mean() - share * y.exp().min()), 1e-12) / terms)
        for powers in torch.cartesian_prod(*[torch.tensor(EXPONENTS)] * terms).reshape(-1, terms):
            pairs = [number for power in powers.tolist() for number in (rest, power)]
            rows.append([float(y.min()) + math.log(share), *pairs])
    return torch.tensor(rows, dtype=y.dtype)


def _minimised(
    rows: Tensor, counts: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each row of unknowns (K, 3 or 5) at a minimum and its cost (K,).

    By Levenberg and Marquardt's steps, reweighted as Huber's loss has it.
    `counts` (K or 1, n) says how often each run occurs, `x` (terms, n) are centred logs.
    """

    def terms(rows: Tensor) -> Tensor:
        parts = [rows[:, :1].expand(-1, len(y))]
        parts += [rows[:, i : i + 1] - rows[:, i + 1 : i + 2] * at for i, at in zip((1, 3), x)]
        return torch.stack(parts, 2)

    def cost(rows: Tensor) -> Tensor:
        size = (terms(rows).logsumexp(2) - y).abs()
        huber = torch.where(size < DELTA, size.square() / 2, DELTA * (size - DELTA / 2))
        return (counts * huber).sum(1)

    # Of logs and of exponents.
    low, high = torch.full_like(rows[0], -40.0), torch.full_like(rows[0], 40.0)
    low[2::2], high[2::2] = 0.0, MOST_EXPONENT
    damping, costs = torch.full_like(rows[:, 0], 1e-2), cost(rows)
    for _ in range(ITERATIONS):
        parts = terms(rows)
        total = parts.logsumexp(2)
        shares = (parts - total[..., None]).exp()
        slopes = [shares[..., 0]]
        for term, at in enumerate(x, start=1):
            slopes += [shares[..., term], -at * shares[..., term]]
        slope, error = torch.stack(slopes, 2), total - y
        trust = counts * (DELTA / error.abs().clamp(min=DELTA))
        curved = torch.einsum("kni,kn,knj->kij", slope, trust, slope)
        steep = torch.einsum("kni,kn->ki", slope, trust * error)
        diagonal = curved.diagonal(dim1=1, dim2=2)
        ridge = damping[:, None] * diagonal + 1e-12
        step = torch.linalg.solve(curved + torch.diag_embed(ridge), steep)
        tried = (rows - step).clamp(low, high)
        new = cost(tried)
        better = new < costs
        rows = torch.where(better[:, None], tried, rows)
        costs = torch.where(better, new, costs)
        damping = torch.where(better, damping / 4, damping * 4).clamp(min=1e-9)
        if bool((damping > MOST_DAMPING).all()):
            break
    return rows, costs
