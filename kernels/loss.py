"""The cross-entropy of a head's logits, a chunk of rows at a time, with its gradients.

Only the logits of one chunk exist. Their gradient, softmax minus target, is written over them
in the forward and taken on to the features and the head's parameters at once, so that the
backward has only to multiply by the gradient from above, as the fused linear cross-entropy of
Hsu et al. (2024, Liger kernel, section 3.2) does; here for any head.

N rows, V columns of logits, D features, C rows of a chunk. Losses and sums are float32, or
float64 for float64 logits, whatever the type of the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdiff.kernels.loss_heads import LinearMap, MatrixHead, ModuleHead, linear_map, wide_of
from mdiff.kernels.loss_rows import Rows, outside_of

# The most that the logits of a chunk take, in bytes. Each chunk reads the head's matrix three
# times and rewrites its gradient, so that more rows cost less, up to where memory counts.
CHUNK_BYTES = {"cpu": 24 << 20}
CHUNK_BYTES_ELSEWHERE = 60 << 20


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
        blocked = blocked | outside_of(span, logits_NV.shape[1])
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
    by_triton: bool = False,
) -> CrossEntropy:
    """The sum over rows of weight times smoothed -log p(target), and -log p(target) of each.

    As `row_nll` of head(features), `chunk` rows at a time, differentiable once in the features,
    the weights and the head's parameters. A head that is a matrix (see `linear_map`) is
    multiplied here; any other module is called on each chunk. A graph that is kept for a
    second backward has its gradients computed again then (a head that draws noise draws again).
    `by_triton` takes the losses and the logits' gradients in Triton, but of float64 logits.

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
        rows=Rows(target_N, forbidden, span, smoothing),
        chunk=chunk,
        by_triton=by_triton,
        autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
    )
    inputs = (features_ND, weight_N, *parameters.values())
    # The types are chosen here; what autocast does is done to the head alone.
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
            return CrossEntropy(*_fused(chunks, *inputs))
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


_fused: Callable[..., tuple[Tensor, Tensor]] = _Fused.apply


@dataclass(frozen=True)
class _Chunks:
    """A head and the rows of the loss; `names` are the parameters that `run` is given."""

    head: nn.Module
    linear: LinearMap | None
    names: tuple[str, ...]
    rows: Rows
    chunk: int | None
    by_triton: bool
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
        head: MatrixHead | ModuleHead
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
            logits_CV, scale_C1 = head.logits(part), None
            if self.by_triton and logits_CV.dtype != torch.float64:
                nll_N[part], smooth_N[part] = self.rows.by_triton_(
                    logits_CV, weight_N[part], part, differentiate=bool(sums)
                )
            else:
                logits_CV = head.widened(logits_CV)
                nll_N[part], smooth_N[part], total_C1 = self.rows.loss_(
                    logits_CV, part, differentiate=bool(sums)
                )
                scale_C1 = weight_N[part, None] / total_C1
            if sums:
                head.take(logits_CV, scale_C1, part)
        return nll_N, smooth_N, sums

    def _even_chunk(self, features_ND: Tensor) -> int:
        """The rows of a chunk where all are about as large, and none above the limit."""
        if self.linear is not None:
            columns = self.linear.columns
        else:
            # A module does not say how many logits it gives; its largest parameter does.
            columns = max((p.shape[0] for p in self.head.parameters() if p.dim()), default=1)
        room = CHUNK_BYTES.get(features_ND.device.type, CHUNK_BYTES_ELSEWHERE)
        kind = self.autocast or features_ND.dtype
        kind = kind if self.by_triton else wide_of(features_ND.dtype)
        most = max(1, room // (columns * kind.itemsize))
        chunks = max(1, -(-len(features_ND) // most))
        return max(1, -(-len(features_ND) // chunks))
