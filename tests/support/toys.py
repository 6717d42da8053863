"""Toys whose law is known: a joint over V^L and the denoiser that is ideal for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.denoiser import FromLogits, from_logits
from mdiff.tokens import TokenSpace


@dataclass(frozen=True)
class Toy:
    """`joint` (V,) * L probabilities; `table` ((V+1)^L, L, V) ideal conditional log-probabilities.

    Canvases are numbered in base V + 1, the mask being digit V.
    """

    joint: Tensor
    table: Tensor
    space: TokenSpace

    @property
    def length(self) -> int:
        return self.joint.dim()

    @property
    def vocab(self) -> int:
        return self.joint.shape[0]

    def number(self, canvas: Tensor) -> Tensor:
        """The number of each canvas (B, L) -> (B,)."""
        base = (self.vocab + 1) ** torch.arange(self.length - 1, -1, -1)
        return (canvas * base).sum(1)

    def canvas(self, number: Tensor) -> Tensor:
        """The canvas of each number (B,) -> (B, L)."""
        base = (self.vocab + 1) ** torch.arange(self.length - 1, -1, -1)
        return number[:, None] // base % (self.vocab + 1)

    def denoiser(self) -> FromLogits:
        return from_logits(lambda tokens: self.table[self.number(tokens)])


def make_toy(vocab: int = 4, length: int = 4, *, seed: int = 0, sharpness: float = 2.0) -> Toy:
    """A random joint with strong dependence and its exact conditionals."""
    generator = torch.Generator().manual_seed(seed)
    shape = (vocab,) * length
    joint = torch.randn(shape, generator=generator, dtype=torch.float64).mul(sharpness).exp()
    joint /= joint.sum()
    space = TokenSpace(vocab, mask_id=vocab)
    table = torch.zeros(((vocab + 1) ** length, length, vocab), dtype=torch.float64)
    toy = Toy(joint, table, space)
    for number, canvas in enumerate(toy.canvas(torch.arange(len(table))).tolist()):
        given = joint
        for position, token in enumerate(canvas):
            if token != vocab:
                keep = torch.zeros(vocab, dtype=torch.float64)
                keep[token] = 1
                given = given * keep.view([-1 if i == position else 1 for i in range(length)])
        for position in range(length):
            others = [i for i in range(length) if i != position]
            marginal = given.sum(others)
            table[number, position] = (marginal / marginal.sum()).log()
    return toy


class HashDenoiser:
    """Logits by exact integer arithmetic on a row's valid tokens: equal in every batch.

    A row's logits depend on all its valid tokens, on their order and on `cond["label"]`, and
    not on padding, so that samples can be compared bit for bit. `rows_asked` counts rows asked.
    """

    uses_time = False

    def __init__(self, space: TokenSpace, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(997, space.vocab_size, generator=generator)
        self.rows_asked = 0
        self.calls = 0

    def __call__(
        self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None, cache=None
    ):
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        rank = torch.where(valid, valid.cumsum(1), 0)
        label = cond["label"][:, None] if cond else 0
        digest = (
            torch.where(valid, (tokens + 3) * rank * (rank + 5), 0).sum(1, keepdim=True)
            + 31 * rank
            + 7 * label
        )
        self.calls += 1
        self.rows_asked += int(tokens.numel() if at is None else at.sum())
        logits = self.table[digest % 997]
        return logits if at is None else logits[at]


def uniform_denoiser(space: TokenSpace) -> FromLogits:
    """The same logit for every id, in float64."""
    return from_logits(lambda tokens: torch.zeros(*tokens.shape, space.vocab_size).double())
