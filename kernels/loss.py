"""The cross-entropy of a head's logits, a chunk of rows at a time, with its gradients.

Only the logits of one chunk exist. Their gradient, softmax minus target, is written over them
in the forward and taken on to the features and the head's parameters at once, so that the
backward has only to multiply by the gradient from above, as the fused linear cross-entropy of
Hsu et al. (2024, Liger kernel, section 3.2) does; here for any head.

N rows, V columns of logits, D features, C rows of a chunk. Losses and sums are float32, or
float64 for float64 logits, whatever the type of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdiff.kernels.loss_heads import Head, LinearMap, MatrixHead, ModuleHead, linear_map, wide_of

# The most that the logits of a chunk take, in bytes. Each chunk reads the head's matrix three
# times and rewrites its gradient, so that more rows cost less, up to where memory counts.
CHUNK_BYTES = {"cpu": 24 << 20}
CHUNK_BYTES_ELSEWHERE = 64 << 20


class CrossEntropy(NamedTuple):
    """`value` scalar, weighted and smoothed, with a graph; `nll` (N,) nats, without one."""

    value: Tensor
    nll: Tensor


def row_nll(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    forbidden: tuple[int, ...] = (),
    span: Tensor | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """-log p(target) and its smoothed form, both (N,) nats, over permitted ids: the definition.

    `forbidden` ids and those outside a row's `span` (N, 2) (first, stop) have probability 0;
    with smoothing a, (1 - a) (-log p(target)) + a times the mean of -log p over permitted ids.
    """
    logits_NV = logits_NV.to(wide_of(logits_NV.dtype))
    blocked = torch.zeros(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
    if forbidden:
        blocked[list(forbidden)] = True
    blocked = blocked[None]
    if span is not None:
        blocked = blocked | _outside(span, logits_NV.shape[1])
    if span is not None or forbidden:
        logits_NV = logits_NV.masked_fill(blocked, -torch.inf)
    log_p_NV = logits_NV.log_softmax(1)
    nll_N = -log_p_NV.gather(1, target_N[:, None])[:, 0]
    if smoothing == 0:
        return nll_N, nll_N
    allowed = ~blocked.expand(logits_NV.shape)
    mean_N = torch.where(allowed, log_p_NV, 0.0).sum(1) / allowed.sum(1)
    return nll_N, (1 - smoothing) * nll_N - smoothing * mean_N


def chunked_cross_entropy(
    features_ND: Tensor,
    head: nn.Module,
    target_N: Tensor,
    *,
    weight_N: Tensor,
    forbidden: tuple[int, ...] = (),
    span: Tensor | None = None,
    smoothing: float = 0.0,
    chunk: int | None = None,
) -> CrossEntropy:
    """The sum over rows of weight times smoothed -log p(target), and -log p(target) of each.

    As `row_nll` of head(features), `chunk` rows at a time, differentiable once in the features,
    the weights and the head's parameters. A head that is a matrix (see `linear_map`) is
    multiplied here; any other module is called on each chunk. A graph that is kept for a
    second backward has its gradients computed anew then (a head that draws noise draws again).

    Raises RuntimeError where the head's logits depend on tensors that are not its parameters,
    and in a backward that is asked for a second derivative.
    """
    linear = linear_map(head)
    parameters: dict[str, Tensor]
    if linear is None:
        parameters = {name: p for name, p in head.named_parameters() if p.requires_grad}
    else:
        parameters = {"weight": linear.weight}
        if linear.bias is not None:
            parameters["bias"] = linear.bias
    device = features_ND.device.type
    chunks = _Chunks(
        head=head,
        linear=linear,
        names=tuple(parameters),
        rows=_Rows(target_N, _indices(forbidden, target_N.device), span, smoothing),
        chunk=chunk,
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    inputs = (features_ND, weight_N, *parameters.values())
    # The types are chosen here; what autocast does is done to the head alone.
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
            return CrossEntropy(*_Fused.apply(chunks, *inputs))  # type: ignore[no-untyped-call]
        with torch.no_grad():
            nll_N, smooth_N, _ = chunks.run(*inputs, wanted=[False] * len(inputs))
            return CrossEntropy((weight_N * smooth_N).sum(), nll_N)


class _Fused(torch.autograd.Function):
    """The loss as one node: its forward computes the gradients, its backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, chunks: _Chunks, features_ND: Tensor, weight_N: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.chunks, ctx.wanted = chunks, list(ctx.needs_input_grad[1:])
        nll_N, smooth_N, ctx.gradients = chunks.run(
            features_ND, weight_N, *parameters, wanted=ctx.wanted
        )
        ctx.save_for_backward(smooth_N, features_ND, weight_N, *parameters)
        ctx.mark_non_differentiable(nll_N)
        return (weight_N * smooth_N).sum(), nll_N

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked cross-entropy has no second derivative: expected a backward "
                "without create_graph; for one, take the loss of head(features)"
            )
        smooth_N, *inputs = ctx.saved_tensors
        # They are handed over, not copied: the gradient of a large matrix is not held twice.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = ctx.chunks.run(*inputs, wanted=ctx.wanted)[2]
        # Elsewhere than on the CPU reading the factor would wait for the device.
        if upstream.device.type != "cpu" or upstream.item() != 1:
            for gradient in gradients.values():
                gradient.mul_(upstream)
        found = [
            gradients[name].to(given.dtype) if name in gradients else None
            for name, given in zip(("features", "", *ctx.chunks.names), inputs)
        ]
        found[1] = upstream * smooth_N if ctx.wanted[1] else None
        return (None, *found)


@dataclass(frozen=True)
class _Chunks:
    """A head and the rows it is asked for; `names` are the parameters that `run` is given."""

    head: nn.Module
    linear: LinearMap | None
    names: tuple[str, ...]
    rows: _Rows
    chunk: int | None
    autocast: torch.dtype | None

    def run(
        self, features_ND: Tensor, weight_N: Tensor, *parameters: Tensor, wanted: list[bool]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """-log p and its smoothed form, (N,), and the wanted gradients of their weighted sum.

        `wanted` is said of the features, the weights (whose gradient the losses are) and each
        parameter; the gradients are named "features" and as the parameters.
        """
        inputs = zip(("features", "", *self.names), (features_ND, weight_N, *parameters), wanted)
        sums = {
            name: torch.zeros_like(given, dtype=wide_of(given.dtype))
            for name, given, needed in inputs
            if needed and name
        }
        chunk = self.chunk or self._even_chunk(features_ND)
        head: Head
        if self.linear is None:
            head = ModuleHead(features_ND, self.head, autocast=self.autocast, sums=sums)
        else:
            bias = parameters[1] if len(parameters) == 2 else None
            linear = LinearMap(parameters[0], bias, self.linear.columns)
            head = MatrixHead(features_ND, linear, chunk=chunk, autocast=self.autocast, sums=sums)
        nll_N = torch.empty_like(weight_N)
        smooth_N = torch.empty_like(weight_N)
        for start in range(0, len(features_ND), chunk):
            part = slice(start, start + chunk)
            logits_CV = head.logits(part)
            nll_N[part], smooth_N[part], total_C1 = self.rows.loss_(
                logits_CV, part, differentiate=bool(sums)
            )
            if sums:
                head.take(logits_CV, weight_N[part, None] / total_C1, part)
        return nll_N, smooth_N, sums

    def _even_chunk(self, features_ND: Tensor) -> int:
        """The rows of a chunk where all are about as large, and none above the limit."""
        if self.linear is not None:
            columns = self.linear.columns
        else:
            # A module does not say how many logits it gives; its largest parameter does.
            columns = max((p.shape[0] for p in self.head.parameters() if p.dim()), default=1)
        room = CHUNK_BYTES.get(features_ND.device.type, CHUNK_BYTES_ELSEWHERE)
        most = max(1, room // (columns * wide_of(features_ND.dtype).itemsize))
        chunks = max(1, -(-len(features_ND) // most))
        return max(1, -(-len(features_ND) // chunks))


@dataclass(frozen=True)
class _Rows:
    """The rows' targets (N,), the forbidden ids (K,), spans (N, 2) and the smoothing."""

    targets: Tensor
    forbidden: Tensor | None
    span: Tensor | None
    smoothing: float

    def loss_(
        self, logits_CV: Tensor, part: slice, *, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-log p and its smoothed form (C,) of wide logits, which become their gradient.

        What is written over them is the gradient of the smoothed form times the row's total
        S = sum of exp(x - peak), returned third, (C, 1): S (p - (1 - a) target - a / K) over K
        permitted ids. Who multiplies by weight / S elsewhere spares a pass over the chunk.
        """
        target_C1, columns = self.targets[part, None], logits_CV.shape[1]
        span = None if self.span is None else self.span[part]
        outside = None if span is None else _outside(span, columns)
        self._fill_(logits_CV, outside, -torch.inf)
        logits_CV.sub_(logits_CV.amax(1, keepdim=True))
        log_weight_C1 = logits_CV.gather(1, target_C1)
        if self.smoothing:
            permitted = self._permitted(span, columns)
            self._fill_(logits_CV, outside, 0.0)
            mean_C1 = logits_CV.sum(1, keepdim=True) / permitted
            self._fill_(logits_CV, outside, -torch.inf)
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
            self._fill_(logits_CV, outside, 0.0)
        return nll_C1[:, 0], smooth_C1[:, 0], total_C1

    def _fill_(self, values_CV: Tensor, outside: Tensor | None, value: float) -> None:
        """Write one value at the ids that are not permitted."""
        if self.forbidden is not None:
            values_CV.index_fill_(1, self.forbidden, value)
        if outside is not None:
            values_CV.masked_fill_(outside, value)

    def _permitted(self, span: Tensor | None, columns: int) -> int | Tensor:
        """How many ids each row permits: one number, or (C, 1)."""
        forbidden_K = self.forbidden
        if span is None:
            return columns - (0 if forbidden_K is None else len(forbidden_K))
        span = span.clamp(0, columns)
        first, stop = span[:, :1], span[:, 1:]
        inside: Tensor = (stop - first).clamp(min=0)
        if forbidden_K is not None:
            barred = (forbidden_K >= first) & (forbidden_K < stop)
            inside = inside - barred.sum(1, keepdim=True)
        return inside


def _outside(span: Tensor, columns: int) -> Tensor:
    """Which columns lie outside of each row's span, (N, V) bool."""
    column = torch.arange(columns, device=span.device)
    return (column < span[:, :1]) | (column >= span[:, 1:])


def _indices(ids: tuple[int, ...], device: torch.device) -> Tensor | None:
    return torch.tensor(ids, dtype=torch.int64, device=device) if ids else None
