"""The loss of a chunk's rows from their logits, which become their gradient: torch and Triton.

N rows, V columns of logits, C rows of a chunk. -log p(target) and its smoothed form are sums in
float32, or float64 for float64 logits.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mdiff.kernels.draw_triton import forbidden_map

# Columns that a program of the kernel takes at a time, and its warps.
BLOCK, WARPS = 4096, 8


@dataclass(frozen=True)
class Rows:
    """The rows' targets (N,), the forbidden ids, spans (N, 2) and the smoothing."""

    targets: Tensor
    forbidden: tuple[int, ...]
    span: Tensor | None
    smoothing: float

    def by_triton_(
        self, logits_CV: Tensor, weight_C: Tensor, part: slice, *, differentiate: bool
    ) -> tuple[Tensor, Tensor]:
        """-log p and its smoothed form (C,) float32; the logits become weight times its gradient.

        As `loss_`, in one kernel, in the type that the logits have, float16, bfloat16 or
        float32: one read, and a second with a write where `differentiate` says so.
        """
        from mdiff.kernels.gpu.loss import loss_kernel

        rows, columns = logits_CV.shape
        found = torch.empty((2, rows), dtype=torch.float32, device=logits_CV.device)
        span = None if self.span is None else self.span[part].contiguous()
        block = min(BLOCK, 1 << max(columns - 1, 0).bit_length())
        next_id, _ = forbidden_map(self.forbidden, columns, block, logits_CV.device)
        if rows:
            with torch.cuda.device(logits_CV.get_device()):
                loss_kernel[(rows,)](
                    logits_CV, logits_CV.stride(0), self.targets[part].contiguous(),
                    weight_C.float().contiguous(), next_id, span, found, rows, columns,
                    self.smoothing, DIFFERENTIATE=differentiate, SMOOTHED=self.smoothing > 0,
                    BLOCK=block, num_warps=WARPS,
                )  # fmt: skip
        return found[0], found[1]

    def loss_(
        self, logits_CV: Tensor, part: slice, *, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-log p and its smoothed form (C,) of wide logits, which become their gradient.

        What is written over them is the gradient of the smoothed form times the row's total
        S = sum of exp(x - peak), returned third, (C, 1): S (p - (1 - a) target - a / K) over K
        permitted ids. Who multiplies by weight / S elsewhere spares a pass over the chunk.
        """
        target_C1, columns = self.targets[part, None], logits_CV.shape[1]
        forbidden = _indices(self.forbidden, logits_CV.device)
        span = None if self.span is None else self.span[part]
        outside = None if span is None else outside_of(span, columns)
        _fill_(logits_CV, forbidden, outside, -torch.inf)
        logits_CV.sub_(logits_CV.amax(1, keepdim=True))
        log_weight_C1 = logits_CV.gather(1, target_C1)
        if self.smoothing:
            permitted = _permitted(forbidden, span, columns)
            _fill_(logits_CV, forbidden, outside, 0.0)
            mean_C1 = logits_CV.sum(1, keepdim=True) / permitted
            _fill_(logits_CV, forbidden, outside, -torch.inf)
        total_C1 = logits_CV.exp_().sum(1, keepdim=True)
        log_total_C1 = total_C1.log()
        nll_C1 = log_total_C1 - log_weight_C1
        smooth_C1 = nll_C1
        if self.smoothing:
            spread_C1 = log_total_C1 - mean_C1
            smooth_C1 = (1 - self.smoothing) * nll_C1 + self.smoothing * spread_C1
        if differentiate:
            if self.smoothing:
                logits_CV.sub_(total_C1 * self.smoothing / permitted)
            left_C1 = logits_CV.gather(1, target_C1) - (1 - self.smoothing) * total_C1
            logits_CV.scatter_(1, target_C1, left_C1)
            _fill_(logits_CV, forbidden, outside, 0.0)
        return nll_C1[:, 0], smooth_C1[:, 0], total_C1


def outside_of(span: Tensor, columns: int) -> Tensor:
    """Which columns lie outside of each row's span, (N, V) bool."""
    column = torch.arange(columns, device=span.device)
    return (column < span[:, :1]) | (column >= span[:, 1:])


def _fill_(
    values_CV: Tensor, forbidden: Tensor | None, outside: Tensor | None, value: float
) -> None:
    """Write one value at the ids that are not permitted."""
    if forbidden is not None:
        values_CV.index_fill_(1, forbidden, value)
    if outside is not None:
        values_CV.masked_fill_(outside, value)


def _permitted(forbidden: Tensor | None, span: Tensor | None, columns: int) -> int | Tensor:
    """How many ids each row permits: one number, or (C, 1)."""
    if span is None:
        return columns - (0 if forbidden is None else len(forbidden))
    span = span.clamp(0, columns)
    first, stop = span[:, :1], span[:, 1:]
    inside: Tensor = (stop - first).clamp(min=0)
    if forbidden is not None:
        barred = (forbidden >= first) & (forbidden < stop)
        inside = inside - barred.sum(1, keepdim=True)
    return inside


@lru_cache(maxsize=16)
def _indices(ids: tuple[int, ...], device: torch.device) -> Tensor | None:
    return torch.tensor(ids, dtype=torch.int64, device=device) if ids else None
