"""The draw as it is defined, tile by tile in plain torch: the truth for every backend.

Tile reservoir: the columns are read in tiles; s is a tile's mass and S the mass before it.
The tile is accepted with probability s / (S + s), the last accepted tile wins (weighted
reservoir sampling, Chao 1982), and inverse CDF inside it picks the id. Two uniforms a tile,
none an element, and the law is exactly softmax.
"""

from typing import NamedTuple, overload

import torch
from torch import Tensor

from mdiff.kernels import philox

TILE = 1024


class Draw(NamedTuple):
    """What one pass over a row of logits gives; each field is (N,).

    `tokens` int64; `log_prob`, `entropy` nats; `margin` = p1 - p2, of the two likeliest ids.
    A row that holds NaN or +inf, or has no finite permitted logit, draws the lowest permitted
    id and has NaN in the other three.
    """

    tokens: Tensor
    log_prob: Tensor
    entropy: Tensor
    margin: Tensor


def draw_reference(
    logits_NV: Tensor,
    *,
    seed: Tensor,
    sample: Tensor,
    step: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    forbidden: tuple[int, ...] = (),
    span: Tensor | None = None,
    measure: str = "model",
    unconditional: Tensor | None = None,
    scale: Tensor | None = None,
    tile: int = TILE,
) -> Draw:
    """One id a row and its figures, in float64; arguments as `mdiff.ops.draw`, resolved.

    `seed`, `sample`, `step`, `position` (N,) int64; `span` (N, 2) int64 or None;
    `unconditional` (N, V) and `scale` (N,) float64 both or neither.
    """
    model_NV = logits_NV.detach().double().clone()
    if unconditional is not None and scale is not None:
        model_NV = guided_logits(model_NV, unconditional.double(), scale)
    model_NV[~permitted_columns(model_NV, forbidden, span)] = -torch.inf
    drawn_NV = model_NV.clone()
    if temperature > 0:
        drawn_NV /= temperature
    drawn_NV[~kept_columns(drawn_NV, top_k, top_p, min_p)] = -torch.inf
    rows = []
    for n in range(len(model_NV)):
        measured = drawn_NV[n] if measure == "drawn" else model_NV[n]
        sound = bool(torch.isfinite(model_NV[n].amax())) and not bool(model_NV[n].isnan().any())
        if not sound:
            allowed = permitted_columns(
                model_NV[n : n + 1].nan_to_num(),
                forbidden,
                None if span is None else span[n : n + 1],
            )[0]
            rows.append((int(allowed.nonzero()[0]), *[float("nan")] * 3))
            continue
        token = (
            int(drawn_NV[n].argmax())
            if temperature == 0
            else _reservoir(drawn_NV[n], tile, seed[n], sample[n], step[n], position[n])
        )
        rows.append((token, *_figures(measured, token)))
    tokens, *figures = zip(*rows) if rows else ((), (), (), ())
    return Draw(
        torch.tensor(tokens, dtype=torch.int64, device="cpu"),
        *(torch.tensor(column, dtype=torch.float64, device="cpu") for column in figures),
    )


def _reservoir(
    logits_V: Tensor, tile: int, seed: Tensor, sample: Tensor, step: Tensor, position: Tensor
) -> int:
    """The id of one row: running maximum, one acceptance a tile, inverse CDF in the winner."""
    peak, mass = -torch.inf, 0.0
    token = -1
    for index, start in enumerate(range(0, len(logits_V), tile)):
        part = logits_V[start : start + tile]
        new_peak = max(peak, float(part.max()))
        if new_peak == -torch.inf:
            continue
        mass *= float(torch.exp(torch.tensor(peak - new_peak, dtype=torch.float64, device="cpu")))
        peak = new_peak
        weights = torch.exp(part - peak)
        total = float(weights.sum())
        accept, pick, _, _ = philox.words(seed, position, sample, step, (philox.DRAW << 24) | index)
        if total > 0 and float(philox.to_uniform(accept)) * (mass + total) < total:
            cumulative = weights.cumsum(0)
            target = float(philox.to_uniform(pick)) * float(cumulative[-1])
            token = start + int((cumulative <= target).sum())
        mass += total
    return token


def _figures(logits_V: Tensor, token: int) -> tuple[float, float, float]:
    """Log-probability of the token, entropy and margin of one row, in nats."""
    log_p = torch.log_softmax(logits_V, 0)
    p = log_p.exp()
    entropy = -(p * torch.where(p > 0, log_p, 0.0)).sum()
    best = p.topk(min(2, len(p))).values
    margin = best[0] - (best[1] if len(best) > 1 else 0.0)
    return float(log_p[token]), float(entropy), float(margin)


def guided_logits(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Guided logits u + s (c - u), of logits (N, ..., V) and scales (N,), in the logits' type.

    A row whose scale is 1 is c, whatever u holds. An id that both exclude, -inf - -inf, is
    excluded; one that only u excludes has no value: NaN.
    """
    s = scale.to(conditional.dtype).view(-1, *[1] * (conditional.dim() - 1))
    mixed = unconditional + s * (conditional - unconditional)
    excluded = (conditional == -torch.inf) & (unconditional == -torch.inf)
    return torch.where(s == 1, conditional, mixed.masked_fill(excluded, -torch.inf))


@overload
def unit_stride(table: Tensor) -> Tensor: ...
@overload
def unit_stride(table: None) -> None: ...
def unit_stride(table: Tensor | None) -> Tensor | None:
    """The table (N, V) with the columns of a row side by side, rows anywhere."""
    if table is None or table.shape[1] == 1 or table.stride(1) == 1:
        return table
    return table.contiguous()


def permitted_columns(logits_NV: Tensor, forbidden: tuple[int, ...], span: Tensor | None) -> Tensor:
    """Which ids a row may draw at all, (N, V) bool."""
    columns = torch.arange(logits_NV.shape[1], device=logits_NV.device)
    allowed = torch.ones_like(logits_NV, dtype=torch.bool)
    if forbidden:
        allowed[:, list(forbidden)] = False
    if span is not None:
        allowed &= (columns >= span[:, :1]) & (columns < span[:, 1:])
    return allowed


def kept_columns(
    logits_NV: Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """Which ids the filters keep, (N, V) bool, of logits after temperature.

    top_k first: exactly k, ties to the lowest id. Then top_p: the fewest of those whose
    renormalised mass reaches p (Holtzman et al. 2020). Then min_p: at least min_p times the
    largest probability (Nguyen et al. 2024).
    """
    kept = torch.ones_like(logits_NV, dtype=torch.bool)
    vocab = logits_NV.shape[1]
    if (top_k is not None and top_k < vocab) or (top_p is not None and top_p < 1):
        ordered, order = logits_NV.sort(dim=1, descending=True, stable=True)
        if top_k is not None and top_k < vocab:
            ordered[:, top_k:] = -torch.inf
        count = torch.isfinite(ordered).sum(1)
        if top_p is not None and top_p < 1:
            p = ordered.softmax(1)
            count = torch.minimum(count, ((p.cumsum(1) - p) < top_p).sum(1))
        in_front = torch.arange(vocab, device=logits_NV.device) < count.clamp(min=1)[:, None]
        kept = torch.zeros_like(kept).scatter(1, order, in_front)
    if min_p is not None and min_p > 0:
        floor = logits_NV.amax(1, keepdim=True) + torch.log(
            torch.tensor(min_p, dtype=logits_NV.dtype, device=logits_NV.device)
        )
        kept &= logits_NV >= floor
    return kept
