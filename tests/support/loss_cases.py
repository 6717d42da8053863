"""Heads, rows and the plain path that losses of features are compared with."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from mdiff.backbones.transformer import Head
from mdiff.ops import masked_cross_entropy

WIDTH, COLUMNS = 6, 23


def bert_head():
    """A dense layer, a norm and a decoder with a bias: the head of a tiny masked language model."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForMaskedLM(BertConfig(vocab_size=COLUMNS, hidden_size=WIDTH, **shape)).cls


HEADS = {
    "bias": lambda: nn.Linear(WIDTH, COLUMNS),
    "no bias": lambda: nn.Linear(WIDTH, COLUMNS, bias=False),
    "one row more": lambda: Head(WIDTH, COLUMNS, COLUMNS + 1, 0.5),
    "masked language model": bert_head,
    "module": lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, COLUMNS)),
}


def head_of(name, dtype=torch.float64):
    torch.manual_seed(3)
    head = HEADS[name]().to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.7)
    return head


def rows_of(dtype=torch.float64, batch=3, length=5, seed=1, columns=COLUMNS, width=WIDTH):
    """Features, targets, weights and which are hidden; targets are from 8 to below 20."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, length, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(8, min(columns, 20), (batch, length), generator=generator)
    weights = torch.rand(batch, length, generator=generator) * 3
    hidden = torch.rand(batch, length, generator=generator) < 0.7
    return features, targets, weights.to(dtype).requires_grad_(), hidden


def spans_of(count):
    """Two kinds of rows, whose targets lie within both kinds of span."""
    return torch.tensor([[2, 21], [8, 23]]).repeat(count, 1)[:count]


def plain(features, head, targets, rows, weights, *, spans=None, never=(), label_smoothing=0.0):
    """All logits, every id that is not permitted at -inf, and autograd."""
    logits = head(features)[rows]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    blocked = torch.zeros(logits.shape, dtype=torch.bool)
    blocked[:, list(never)] = True
    if spans is not None:
        ids = torch.arange(logits.shape[1])
        blocked |= (ids < spans[:, :1]) | (ids >= spans[:, 1:])
    log_p = logits.masked_fill(blocked, -torch.inf).log_softmax(1)
    nll = -log_p.gather(1, targets[rows][:, None])[:, 0]
    smooth = nll
    if label_smoothing:
        spread = -log_p.masked_fill(blocked, 0).sum(1) / (~blocked).sum(1)
        smooth = (1 - label_smoothing) * nll + label_smoothing * spread
    return (weights[rows] * smooth).sum(), nll


def both(head, data, options, *, chunk=None, factor=1.7):
    """(value, nll, gradients) of the chunked and of the plain path."""
    features, targets, weights, rows = data
    options = dict(options)
    spans = spans_of(int(rows.sum())) if options.pop("spans", False) else None
    inputs = [features, weights, *head.parameters()]
    ours = masked_cross_entropy(
        features, head, targets, rows=rows, weights=weights, span=spans, chunk=chunk, **options
    )
    theirs = plain(features, head, targets, rows, weights, spans=spans, **options)
    return [
        (value, nll, torch.autograd.grad(factor * value, inputs)) for value, nll in (ours, theirs)
    ]


def relative(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


OPTIONS = {
    "plain": {},
    "never": {"never": (0, 7, 22)},
    "smoothing": {"label_smoothing": 0.1},
    "never and smoothing": {"never": (7,), "label_smoothing": 0.3},
    "spans": {"spans": True},
    "all": {"spans": True, "never": (0, 7, 22), "label_smoothing": 0.1},
}
