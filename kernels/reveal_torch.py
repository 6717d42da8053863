"""Which of the drawn tokens stay, and their writing, in vectorised torch without a wait."""

from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.kernels.reference import Draw


class Revealed(NamedTuple):
    """A canvas after one reveal; each field is (B, L).

    `tokens` int64; `at` bool, the positions written; `log_prob` and `entropy` of their draws, 0
    elsewhere.
    """

    tokens: Tensor
    at: Tensor
    log_prob: Tensor
    entropy: Tensor


def reveal_torch(
    tokens_BL: Tensor,
    requested_BL: Tensor,
    drawn: Draw,
    score_N: Tensor,
    *,
    count_B: Tensor,
    threshold: float | None = None,
) -> Revealed:
    """Write the surest of the tokens drawn at `requested_BL` (B, L) bool into `tokens_BL` int64.

    `drawn` and `score_N` are of the N requested positions, row-major. Of each sample the `count_B`
    (B,) int64 positions of the highest score are chosen, ties to the first one, NaN last; with a
    threshold also every position whose score is at least that. The canvas given is not changed,
    and there is no host-device synchronisation.
    """
    at_BL = surest(requested_BL, score_N, count_B=count_B, threshold=threshold)
    return written(tokens_BL, requested_BL, drawn, at_BL)


def surest(
    requested_BL: Tensor, score_N: Tensor, *, count_B: Tensor, threshold: float | None = None
) -> Tensor:
    """Of the positions `requested_BL`, the ones that `reveal_torch` writes, (B, L) bool."""
    lowest = torch.finfo(score_N.dtype).min
    known_N = score_N.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)
    score_BL = score_N.new_full(requested_BL.shape, -torch.inf).masked_scatter(
        requested_BL, known_N
    )
    rank_BL = score_BL.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    at_BL = requested_BL & (rank_BL < count_B[:, None])
    return at_BL if threshold is None else at_BL | (requested_BL & (score_BL >= threshold))


def written(
    tokens_BL: Tensor,
    requested_BL: Tensor,
    drawn: Draw,
    at_BL: Tensor,
    *,
    blank_BL: Tensor | None = None,
) -> Revealed:
    """The draws of `requested_BL` written at `at_BL`, all of them or some.

    `blank_BL` are zeros of the figures' type, where they are at hand.
    """
    if blank_BL is None or blank_BL.dtype != drawn.log_prob.dtype:
        blank_BL = drawn.log_prob.new_zeros(requested_BL.shape)
    tokens = tokens_BL.masked_scatter(requested_BL, drawn.tokens)
    log_prob = blank_BL.masked_scatter(requested_BL, drawn.log_prob)
    entropy = blank_BL.masked_scatter(requested_BL, drawn.entropy)
    if requested_BL is not at_BL:
        tokens = torch.where(at_BL, tokens, tokens_BL)
        log_prob, entropy = torch.where(at_BL, log_prob, 0), torch.where(at_BL, entropy, 0)
    return Revealed(tokens, at_BL, log_prob, entropy)
