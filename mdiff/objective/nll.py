"""What the clean tokens at hidden places cost: -log p, by a denoiser or by its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mdiff.denoiser import Denoiser, has_own_head
from mdiff.kernels.loss import CrossEntropy, row_nll
from mdiff.ops import masked_cross_entropy
from mdiff.tokens import TokenSpace


def token_nll(logits: Tensor, tokens: Tensor, noisy: Tensor, *, space: TokenSpace) -> Tensor:
    """-log p of the clean `tokens` where `noisy` hides them, (B, L) nats, 0 elsewhere.

    `logits` (B, L, V). At least float32 inside; float64 stays float64.
    """
    hidden = noisy == space.mask_id
    nll, _ = row_nll(
        logits[hidden], tokens[hidden], forbidden=space.forbidden, span=_spans_at(space, hidden)
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
    **told: Any,
) -> CrossEntropy:
    """The weighted sum over hidden places (N) of smoothed -log p, and -log p of each, (N,).

    The denoiser is called with `noisy` (B, L) and what it is `told`; `weights` (N,). Where it
    is its features and a head, the logits are never whole.
    """
    spans, targets = _spans_at(space, hidden), tokens[hidden]
    if has_own_head(denoiser) and isinstance(denoiser.head, nn.Module):
        features = denoiser.features(noisy, at=hidden, **told)
        return masked_cross_entropy(
            features, denoiser.head, targets, weights=weights, never=space.forbidden, span=spans,
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
