"""The cost of the clean tokens at hidden positions: -log p, by a denoiser or by its logits."""

from collections.abc import Callable
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from mdiff.denoiser import Cache, Condition, Denoiser, has_own_head
from mdiff.kernels.loss import CrossEntropy, row_nll
from mdiff.ops import masked_cross_entropy
from mdiff.tokens import TokenSpace


class Inputs(TypedDict, total=False):
    """What a denoiser is called with beside the tokens and `at`."""

    valid: Tensor | None
    documents: Tensor | None
    t: Tensor | None
    cond: Condition | None
    cache: Cache | None


def token_nll(logits: Tensor, tokens: Tensor, noisy: Tensor, *, space: TokenSpace) -> Tensor:
    """-log p of the clean `tokens` where `noisy` hides them, (B, L) nats, 0 elsewhere.

    `logits` (B, L, V). At least float32 inside; float64 stays float64.
    """
    hidden = noisy == space.mask_id
    nll, _ = row_nll(
        logits[hidden], tokens[hidden], forbidden=space.forbidden, span=spans_at(space, hidden)
    )
    return torch.zeros(tokens.shape, dtype=nll.dtype, device=nll.device).masked_scatter(hidden, nll)


def hidden_loss(
    denoiser: Denoiser,
    noisy: Tensor,
    tokens: Tensor,
    hidden: Tensor,
    *,
    space: TokenSpace,
    weights: Tensor | None = None,
    smoothing: float = 0.0,
    **inputs: Unpack[Inputs],
) -> CrossEntropy:
    """The weighted sum over hidden positions (N) of smoothed -log p, and -log p of each, (N,).

    The denoiser is called with `noisy` (B, L) and `inputs`; `weights` (N,). Where it is its
    features and a head, the logits never exist all at once.
    """
    spans, targets = spans_at(space, hidden), tokens[hidden]
    if has_own_head(denoiser) and isinstance(denoiser.head, nn.Module):
        features: Callable[..., Tensor] = denoiser.features
        return masked_cross_entropy(
            features(noisy, at=hidden, **inputs), denoiser.head, targets, weights=weights,
            never=space.forbidden, span=spans, label_smoothing=smoothing,
        )  # fmt: skip
    logits = denoiser(noisy, at=hidden, **inputs)
    nll, smooth = row_nll(
        logits, targets, forbidden=space.forbidden, span=spans, smoothing=smoothing
    )
    weighted = smooth if weights is None else weights.to(nll.dtype) * smooth
    return CrossEntropy(weighted.sum(), nll.detach())


def spans_at(space: TokenSpace, hidden: Tensor) -> Tensor | None:
    """The (first, stop) ids of each hidden position, (N, 2), or None without parts."""
    spans = space.spans(hidden.shape[1], hidden.device)
    return None if spans is None else spans.expand(*hidden.shape, 2)[hidden]
