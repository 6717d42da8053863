"""The exactness that every backend of the draw is held to, and the laws that it is asked on."""

from __future__ import annotations

import torch

VOCAB = 50_257
# Nats, nats, and half the sum of absolute differences of probabilities.
ENTROPY, LOG_PROB, TOTAL_VARIATION = 1e-3, 1e-4, 1e-4
TAIL = 6e-8


def two_levels(vocab=VOCAB):
    """One likely id, and a tail of ids of 6e-8 each, (V,) logits."""
    log_p = torch.full((vocab,), TAIL, dtype=torch.float64).log()
    log_p[0] = torch.log1p(torch.tensor(-(vocab - 1) * TAIL, dtype=torch.float64))
    return log_p.float()


def distributions(vocab=VOCAB):
    """Logits (V,) float32 by name: of Zipf, broad, peaked over a tail, flat, and of two levels."""
    noise = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    column = torch.arange(vocab)
    return {
        "zipf": -(column + 1.0).log(),
        "normal": 3 * noise,
        "peaked": noise + 12 * (column == 17) + 10 * (column == vocab - 2),
        "flat": 0 * noise,
        "two levels": two_levels(vocab),
    }


def total_variation(p, logits):
    """Half of the sum of |p - softmax(logits)|, of a law p (V,) float64."""
    return float((p - logits.double().softmax(0)).abs().sum() / 2)


def figures_agree(drawn, logits):
    """Assert the figures of draws from logits (N, V) to be those of float64."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(1)
    top = p.topk(2).values
    own = log_p.gather(1, drawn.tokens[:, None])[:, 0]
    assert (drawn.entropy.double() - entropy).abs().max() < ENTROPY
    assert (drawn.log_prob.double() - own).abs().max() < LOG_PROB
    assert (drawn.margin.double() - (top[:, 0] - top[:, 1])).abs().max() < LOG_PROB


def counters(rows):
    """Counters of one stream, a row a position."""
    zero = torch.zeros(rows, dtype=torch.int64)
    return {"seed": zero + 9, "sample": zero, "step": zero, "position": torch.arange(rows)}
