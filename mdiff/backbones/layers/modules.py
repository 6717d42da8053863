"""Modules that several backbones share: matrix, norms, gated layer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mdiff.kernels.dense import linear, rms_norm

# The names of a gated layer's three matrices in most files.
GATED = ("gate_proj", "up_proj", "down_proj")
INITIAL_STD = 0.02


class Matrix(nn.Linear):
    """A matrix (outputs, inputs), by default without a bias, multiplied by `dense.linear`."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The map of `x` (..., inputs)."""
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """`dense.rms_norm` with a learned weight (D,), ones at first: the norm of our own models."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D)."""
        return rms_norm(x, self.weight)


class RootNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) over the last axis (Zhang & Sennrich 2019, eq. 4), as published.

    In float32 at least. The weight, if `affine`, multiplies the result in the type of `x` or,
    with `wide_weight`, before it is rounded to that; then the bias is added, if there is one.
    """

    def __init__(
        self, size: int, epsilon: float, *, affine: bool = True, bias: bool = False,
        wide_weight: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.epsilon, self.wide_weight = epsilon, wide_weight
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The normalised `x` (..., D)."""
        wide = root_normal(x, self.epsilon)
        if self.weight is not None and self.wide_weight:
            return (wide * self.weight).to(x.dtype)
        normal = wide.to(x.dtype)
        normal = normal if self.weight is None else self.weight * normal
        return normal if self.bias is None else normal + self.bias


def root_normal(x: Tensor, epsilon: float) -> Tensor:
    """X / sqrt(mean x^2 + epsilon), in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, eq. 6), its matrices under the files' names."""

    def __init__(
        self, width: int, inner: int, *, names: Sequence[str] = GATED,
        matrix: Callable[[int, int], nn.Module] = Matrix,
    ) -> None:  # fmt: skip
        super().__init__()
        gate, up, down = names
        self.add_module(gate, matrix(width, inner))
        self.add_module(up, matrix(width, inner))
        self.add_module(down, matrix(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (..., D)."""
        gate, up, down = self.children()
        result: Tensor = down(F.silu(gate(x)) * up(x))
        return result


def drawn(*shape: int) -> nn.Parameter:
    """A parameter of normal initial values, which those of a file replace."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=INITIAL_STD))


def unbiased(inputs: int, outputs: int) -> nn.Linear:
    """`nn.Linear` without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """The adaLN of a normalised `x`: (1 + scale) x + shift, or `x` where there are none."""
    return x if shift is None or scale is None else x + x * scale + shift
