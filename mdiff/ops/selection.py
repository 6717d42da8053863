"""Which of the drawn tokens are written into the canvas."""

from torch import Tensor

from mdiff.kernels.reference import Draw
from mdiff.kernels.reveal_torch import Revealed, reveal_torch
from mdiff.kernels.reveal_triton import reveal_triton
from mdiff.ops.backend import backend_name


def reveal(
    tokens: Tensor,
    requested: Tensor,
    drawn: Draw,
    score: Tensor,
    *,
    count: Tensor,
    threshold: float | None = None,
    backend: str | None = None,
) -> Revealed:
    """The canvas `tokens` (B, L) with the best of the draws at `requested` (B, L) bool written.

    See `kernels.reveal_torch.reveal_torch`: `count` (B,) int64 positions a sample, those of the
    highest `score` (N,), and all at or above `threshold`. Without a host-device synchronisation.
    The backends are torch and triton, which runs where it is the backend of the draw.
    """
    chosen = backend_name(backend, device=tokens.device.type)
    run = reveal_triton if chosen == "triton" else reveal_torch
    return run(tokens, requested, drawn, score, count_B=count, threshold=threshold)
