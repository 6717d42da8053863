"""Matrix product, norm, attention and dropout, with faster forms where torch is slow on a CPU."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A row of zeros (a padding embedding, say) must normalise to zeros, not to NaN.
EPSILON = 1e-6
HAS_ONEDNN = torch._C._has_mkldnn
# Multiplications from which a product by oneDNN is faster than torch's own.
ONEDNN_FROM = 1 << 21
# Rows from which a product in half precision is faster in float32, its conversions included, on a
# processor without instructions for it: there torch's own loops take up to eight times as long.
WIDENED_FROM = 4
# Longest sequence whose attention weights are materialised while training on the CPU.
SHORT_SEQUENCE = 512


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, which torch itself calls for other types than float32 only.

    Only where HAS_ONEDNN; without a gradient.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@cache
def has_fast_product(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of `dtype` by instructions of its own."""
    if not HAS_ONEDNN or dtype not in (torch.bfloat16, torch.float16):
        return True
    known = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(known._is_mkldnn_bf16_supported())
    return bool(known._is_mkldnn_fp16_supported())


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of x (..., D) and weight (V, D) without a bias.

    In float32 on a CPU, without gradients, by oneDNN: the BLAS that torch is built on is half as
    fast on processors that it does not know. In bfloat16 or float16 on a CPU without
    instructions for it, in float32, rounded at the end. All round differently in the last bit.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and not has_fast_product(x.dtype)
        and x.numel() >= WIDENED_FROM * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    ):
        return linear(x.float(), weight.float()).to(x.dtype)
    if (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= ONEDNN_FROM
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.enabled
    ):
        return onednn_linear(x, weight)
    return F.linear(x, weight)


class _NormOnCPU(torch.autograd.Function):
    """x / rms(x) * weight. Torch composes it on the CPU: four times slower both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=kind)
        scale = (norm.square() / x.shape[-1] + EPSILON).rsqrt().to(x.dtype)
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        result: Tensor = normal * weight.to(x.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        normal, scale, weight = ctx.saved_tensors
        share = grad * normal
        weighted = weight.to(grad.dtype)
        along = (share * weighted).mean(-1, keepdim=True)
        into = torch.addcmul(grad * weighted, normal, along, value=-1).mul_(scale)
        return into, share.sum_to_size(weight.shape).to(weight.dtype)


_norm_on_cpu: Callable[[Tensor, Tensor], Tensor] = _NormOnCPU.apply


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Returns x / sqrt(mean x^2 + 1e-6) * weight over the last axis, in the type of `x`.

    `weight` (..., D) broadcasts over `x` (..., D). The mean is taken in float32 at least
    (Zhang & Sennrich 2019, eq. 4).
    """
    if x.device.type == "cpu":
        return _norm_on_cpu(x, weight)
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON) * weight.to(x.dtype)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, all (B, H, L, D); `mask` (B or 1, 1, L, L) bool or None.

    Torch's fused kernel, except for training on short sequences on the CPU: there its backward
    takes four times as long as that of the three steps written out.
    """
    length = query.shape[2]
    fused = query.device.type != "cpu" or not query.requires_grad or length > SHORT_SEQUENCE
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    if causal:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    result: Tensor = scores.softmax(3) @ value
    return result


def dropout(x: Tensor, share: float) -> Tensor:
    """`x` with about `share` of its entries zeroed and the others scaled up.

    By torch's generator. On the CPU eight entries share one 64-bit draw, so that the share is a
    multiple of 1/256: a draw for each takes longer than the layer before it.
    """
    if x.device.type != "cpu":
        return F.dropout(x, share)
    least = round(share * 256)
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 8),))
    kept = (words.view(torch.uint8)[: x.numel()] >= least).view_as(x)
    return x * kept * (256 / (256 - least))
