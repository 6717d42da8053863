"""Which of the drawn tokens stay, and their writing, in Triton: one program a sample.

The kernel is made on the first call, so that importing this file does not import Triton.
"""

import struct

import torch
from torch import Tensor

from mdiff.kernels.draw_triton import why_not
from mdiff.kernels.reference import Draw
from mdiff.kernels.reveal_torch import Revealed

# Positions of one warp, and the most warps of a program.
POSITIONS_PER_WARP, MOST_WARPS = 128, 8


def reveal_triton(
    tokens_BL: Tensor,
    requested_BL: Tensor,
    drawn: Draw,
    score_N: Tensor,
    *,
    count_B: Tensor,
    threshold: float | None = None,
) -> Revealed:
    """Write the surest of the tokens drawn at `requested_BL` (B, L) bool into `tokens_BL` int64.

    Arguments and result as `reveal_torch.reveal_torch`, in one kernel and without a wait; scores
    are float16, bfloat16, float32 or float64, and a row of the canvas has at most 2^20 positions.
    Raises RuntimeError where `why_not` has a reason.
    """
    reason = why_not(tokens_BL.device.type)
    if reason:
        raise RuntimeError(reason)
    from mdiff.kernels.gpu.reveal import reveal_kernel

    samples, length = tokens_BL.shape
    positions = 1 << max(length - 1, 0).bit_length()
    if score_N.dtype != torch.float64:
        score_N = score_N.float()
    bits = struct.unpack("q", struct.pack("d", threshold or 0.0))[0]
    device, kind = tokens_BL.device, drawn.log_prob.dtype
    tokens = torch.empty((samples, length), dtype=torch.int64, device=device)
    at = torch.empty((samples, length), dtype=torch.bool, device=device)
    log_prob = torch.empty((samples, length), dtype=kind, device=device)
    entropy = torch.empty((samples, length), dtype=kind, device=device)
    if samples and length:
        with torch.cuda.device(tokens_BL.get_device()):
            reveal_kernel[(samples,)](
                tokens_BL.contiguous(), requested_BL.contiguous(), drawn.tokens.contiguous(),
                drawn.log_prob.contiguous(), drawn.entropy.contiguous(), score_N.contiguous(),
                count_B.contiguous(), tokens, at, log_prob, entropy, length, bits,
                POSITIONS=positions, BY_THRESHOLD=threshold is not None,
                num_warps=min(max(positions // POSITIONS_PER_WARP, 1), MOST_WARPS),
            )  # fmt: skip
    return Revealed(tokens, at, log_prob, entropy)
