"""The cross-entropy of a head at the hidden rows."""

import torch
from torch import Tensor, nn

from mdiff.errors import ConfigError
from mdiff.kernels.loss import CrossEntropy, chunked_cross_entropy
from mdiff.kernels.loss_heads import wide_of
from mdiff.ops.backend import backend_name


def masked_cross_entropy(
    features: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    never: tuple[int, ...] = (),
    span: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> CrossEntropy:
    """The cross-entropy of `head(features)` at the chosen rows, without holding their logits.

    `value` is the sum of weight times smoothed -log p(target), `nll` (N,) nats without
    smoothing, weight or graph. `features` (B, L, D) or (N, D); `rows`, bool of their leading
    shape, are the rows that anything is computed for, None all of them. `targets` int64 and
    `weights` (None is 1) have the features' leading shape, or are (N,) already. `never` ids
    and ids outside of a row's `span` (N, 2) (first, stop) have probability 0; smoothing
    spreads over the others.

    The value is differentiable once in the features, the weights and the head's parameters;
    gradients are computed in the forward, `chunk` rows of logits at a time (None: at most 24
    MiB of them on a CPU, 60 MiB elsewhere). In float32, or float64 for float64 features; under
    autocast the logits are those that the head gives there. Where the `backend` of the draw is
    triton (see `backend_name`) a kernel of its own goes from logits to their gradient, else torch.

    Raises ConfigError for shapes, ids or options that do not fit, BackendError for a backend
    that is not here.

    >>> masked_cross_entropy(torch.zeros(2, 3), nn.Linear(3, 1), torch.tensor([0, 0])).nll.tolist()
    [0.0, 0.0]
    """
    _check(features, head, targets, rows, label_smoothing=label_smoothing, chunk=chunk)
    forbidden, leading = tuple(sorted(set(never))), features.shape[:-1]
    if forbidden and forbidden[0] < 0:
        raise ConfigError(f"never={forbidden}: expected ids from 0")
    index = None if rows is None else rows.flatten().nonzero()[:, 0]
    features = features.flatten(0, -2)
    if index is not None:
        features = features.index_select(0, index)
    if weights is None:
        weights = features.new_ones(len(features))
    if span is not None and span.shape != (len(features), 2):
        raise ConfigError(f"span {tuple(span.shape)}: expected ({len(features)}, 2)")
    return chunked_cross_entropy(
        features,
        head,
        _chosen("targets", targets, leading, index),
        weight_N=_chosen("weights", weights, leading, index).to(wide_of(features.dtype)),
        forbidden=forbidden,
        span=span,
        smoothing=label_smoothing,
        chunk=chunk,
        by_triton=backend_name(backend, device=features.device.type) == "triton",
    )


def _check(
    features: Tensor, head: nn.Module, targets: Tensor, rows: Tensor | None, *,
    label_smoothing: float, chunk: int | None,
) -> None:  # fmt: skip
    """Raise ConfigError for arguments of `masked_cross_entropy` that do not fit."""
    if not isinstance(head, nn.Module):
        raise ConfigError(f"head is a {type(head).__name__}: expected a module, for its parameters")
    if features.dim() < 2 or not features.is_floating_point():
        raise ConfigError(f"features {tuple(features.shape)} {features.dtype}: expected (N, D)")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing}: expected 0 up to less than 1")
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise ConfigError(f"chunk={chunk!r}: expected a whole number of rows, at least 1")
    if targets.dtype != torch.int64:
        raise ConfigError(f"targets {targets.dtype}: expected int64")
    leading = features.shape[:-1]
    if rows is not None and (rows.shape != leading or rows.dtype != torch.bool):
        raise ConfigError(f"rows {tuple(rows.shape)} {rows.dtype}: expected {tuple(leading)} bool")


def _chosen(name: str, tensor: Tensor, leading: torch.Size, index: Tensor | None) -> Tensor:
    """The rows `index` of a tensor of that shape; one that has only those stays as it is."""
    count = leading.numel() if index is None else len(index)
    if tensor.shape == leading:
        tensor = tensor.flatten()
        return tensor if index is None else tensor.index_select(0, index)
    if tensor.shape != (count,):
        raise ConfigError(f"{name} {tuple(tensor.shape)}: expected {tuple(leading)} or ({count},)")
    return tensor
