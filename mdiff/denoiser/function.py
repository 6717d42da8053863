"""A denoiser made of a function of the tokens: for toys and tests."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mdiff.denoiser.protocol import Cache, Condition


class FromLogits:
    """A Denoiser over a function of the tokens alone; see `from_logits`."""

    uses_time = False

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """The function's logits, (B, L, V) or the rows `at` (N, V)."""
        logits = self.fn(tokens)
        return logits if at is None else logits[at]


def from_logits(fn: Callable[[Tensor], Tensor]) -> FromLogits:
    """A Denoiser from `fn(tokens (B, L)) -> logits (B, L, V)`: for toys and tests.

    >>> import torch
    >>> model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
    >>> model(torch.zeros(2, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 5])
    """
    return FromLogits(fn)
