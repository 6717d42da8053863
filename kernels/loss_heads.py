"""A head for the chunked loss: logits of some rows, and their gradient taken on from there.

N rows, V columns of logits, D features, C rows of a chunk, R rows of a matrix, V or more.
"Wide" is float64 for float64 logits and else float32.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mdiff.kernels.dense import HAS_ONEDNN, onednn_linear

# torch multiplies float32 matrices by MKL, at about half the speed of the oneDNN in the same
# build where it was measured (AMD Zen 5). oneDNN is asked for tiles of columns (a thread), so
# that what it gives is added while it lies in the cache; for fewer rows than these its
# preparations would cost more than they save.
TILE, ONEDNN_ROWS = 1024, 32
# Rows of logits elsewhere than on a CPU begin at multiples of so many: an odd vocabulary would
# leave the matrix products their slowest kernels, and the loss loads of one logit each.
ALIGNED = {"cpu": 1}
ALIGNED_ELSEWHERE = 16


class LinearMap(NamedTuple):
    """A head's matrix: logits are features times weight[:columns] transposed, plus the bias.

    `weight` (R, D), R at least `columns`; `bias` (columns,) or None.
    """

    weight: Tensor
    bias: Tensor | None
    columns: int


@runtime_checkable
class HasLinearMap(Protocol):
    """A head that says which matrix its `forward` multiplies by."""

    def linear_map(self) -> LinearMap: ...


def linear_map(head: nn.Module) -> LinearMap | None:
    """The matrix that `head` is, or None where it is, or may be, anything more.

    A head is its matrix where the class whose `forward` runs is nn.Linear, or says so by a
    method `linear_map() -> LinearMap` that stands beside that `forward`; and where no hook, no
    replaced `forward` and no special type of tensor comes between.
    """
    if hooked(head):
        return None
    owner = next(kind for kind in type(head).__mro__ if "forward" in vars(kind))
    if owner is nn.Linear and isinstance(head, nn.Linear):
        found = LinearMap(head.weight, head.bias, len(head.weight))
    elif "linear_map" in vars(owner) and isinstance(head, HasLinearMap):
        found = head.linear_map()
    else:
        return None
    return found if type(found.weight) in (Tensor, nn.Parameter) else None


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than the `forward` of its class."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "forward" in vars(module) or any(hooks)


def wide_of(kind: torch.dtype) -> torch.dtype:
    """The type that losses and sums of logits of type `kind` are in."""
    return torch.float64 if kind == torch.float64 else torch.float32


class MatrixHead:
    """A head that is a matrix, with the memory of one chunk for all of them.

    `logits(part)` are (C, V), of the head's type, for the caller to overwrite; `widened` makes
    them wide. `take(gradient, scale, part)` adds the gradients that follow from scale (C, 1), or 1
    for None, times gradient (C, V), of the head's type (without a scale) or wide, to `sums`: those
    of "features" (N, D), and of the parameters by their names.
    """

    def __init__(
        self, features_ND: Tensor, linear: LinearMap, *, chunk: int, autocast: torch.dtype | None,
        sums: dict[str, Tensor],
    ) -> None:  # fmt: skip
        kind, bias = features_ND.dtype, linear.bias
        if autocast is not None and torch.float64 not in (kind, linear.weight.dtype):
            kind = autocast
        self.sums, self.columns = sums, linear.columns
        self.x_ND = features_ND.to(kind)
        self.weight_VD = linear.weight.to(kind)[: linear.columns]
        self.bias_V = None if bias is None else bias.to(kind)
        shape = (min(chunk, len(self.x_ND)), linear.columns)
        apart = ALIGNED.get(features_ND.device.type, ALIGNED_ELSEWHERE)
        width = -(-linear.columns // apart) * apart
        self.raw_CV = self.x_ND.new_empty((shape[0], width))[:, : linear.columns]
        self.wide_CV = self.raw_CV
        self.tiles: list[slice] = []
        on_cpu = features_ND.device.type == "cpu" and kind == torch.float32
        if HAS_ONEDNN and on_cpu and shape[0] >= ONEDNN_ROWS and self.weight_VD.is_contiguous():
            step = TILE * torch.get_num_threads()
            ends = range(0, self.columns, step)
            self.tiles = [slice(i, min(i + step, self.columns)) for i in ends]

    def logits(self, part: slice) -> Tensor:
        """Those of the rows of `part`, in memory that the next call overwrites."""
        x_CD = self.x_ND[part]
        raw_CV = self.raw_CV[: len(x_CD)]
        if self.tiles:
            for tile in self.tiles:
                bias = None if self.bias_V is None else self.bias_V[tile]
                raw_CV[:, tile] = onednn_linear(x_CD, self.weight_VD[tile], bias)
        elif self.bias_V is None:
            torch.mm(x_CD, self.weight_VD.T, out=raw_CV)
        else:
            torch.addmm(self.bias_V, x_CD, self.weight_VD.T, out=raw_CV)
        return raw_CV

    def widened(self, logits_CV: Tensor) -> Tensor:
        """The logits in the type that sums over them need, in memory of their own if it is another.

        Logits of fewer bits are what the head would give.
        """
        wide = wide_of(logits_CV.dtype)
        if wide == logits_CV.dtype:
            return logits_CV
        if self.wide_CV.dtype != wide:
            self.wide_CV = torch.empty_like(self.raw_CV, dtype=wide)
        return self.wide_CV[: len(logits_CV)].copy_(logits_CV)

    def take(self, gradient_CV: Tensor, scale_C1: Tensor | None, part: slice) -> None:
        """Add up the gradients of the features and of the matrix."""
        raw_CV = self.raw_CV[: len(gradient_CV)]
        features, weight, bias = (self.sums.get(name) for name in ("features", "weight", "bias"))
        features_CD = None if features is None else features[part]
        matrix_VD = None if weight is None else weight[: self.columns]
        if raw_CV.dtype != wide_of(raw_CV.dtype):
            if scale_C1 is not None:
                raw_CV.copy_(gradient_CV.mul_(scale_C1))
            if features_CD is not None:
                features_CD.copy_(raw_CV @ self.weight_VD)
            if matrix_VD is not None:
                matrix_VD += raw_CV.T @ self.x_ND[part]
            if bias is not None:
                bias += gradient_CV.sum(0, dtype=bias.dtype)
            return
        # Scaling the rows of features spares a pass over those of logits.
        scaled_CD = self.x_ND[part] if scale_C1 is None else self.x_ND[part] * scale_C1
        for tile in self.tiles:
            # Both products would copy it otherwise.
            gradient = gradient_CV[:, tile].contiguous()
            if features_CD is not None:
                features_CD += onednn_linear(gradient, self.weight_VD[tile].T)
            if matrix_VD is not None:
                matrix_VD[tile] += onednn_linear(gradient.T, scaled_CD.T)
        if not self.tiles and features_CD is not None:
            torch.mm(gradient_CV, self.weight_VD, out=features_CD)
        if not self.tiles and matrix_VD is not None:
            matrix_VD.addmm_(gradient_CV.T, scaled_CD)
        if features_CD is not None and scale_C1 is not None:
            features_CD *= scale_C1
        if bias is not None and scale_C1 is not None:
            bias.addmv_(gradient_CV.T, scale_C1[:, 0])
        elif bias is not None:
            bias += gradient_CV.sum(0)


@runtime_checkable
class _Leaf(Protocol):
    """A node of a graph that adds up the gradient of a tensor."""

    variable: Tensor


class ModuleHead:
    """Another head, with the methods of `MatrixHead`: called and differentiated on each chunk."""

    def __init__(
        self, features_ND: Tensor, head: nn.Module, *, autocast: torch.dtype | None,
        sums: dict[str, Tensor],
    ) -> None:  # fmt: skip
        self.features_ND, self.head, self.autocast, self.sums = features_ND, head, autocast, sums
        # Aliases, so that the hooks of the parameters run once, in the backward.
        self.own = {
            name: parameter.detach().requires_grad_(name in sums)
            for name, parameter in head.named_parameters()
        }
        self.x_CD, self.raw_CV = features_ND, features_ND

    def logits(self, part: slice) -> Tensor:
        """Those of the rows of `part`, with their graph kept for `take`."""
        device = self.features_ND.device.type
        self.x_CD = self.features_ND[part].detach().requires_grad_("features" in self.sums)
        with (
            torch.set_grad_enabled(bool(self.sums)),
            torch.autocast(device, self.autocast, enabled=self.autocast is not None),
        ):
            self.raw_CV = functional_call(self.head, self.own, (self.x_CD,))
        self._check()
        # What the graph keeps of them is not the caller's.
        return self.raw_CV.detach().clone()

    def widened(self, logits_CV: Tensor) -> Tensor:
        """The logits in the type that sums over them need."""
        return logits_CV.to(wide_of(logits_CV.dtype))

    def take(self, gradient_CV: Tensor, scale_C1: Tensor | None, part: slice) -> None:
        """Add up the gradients of the features and of the parameters."""
        if not self.raw_CV.requires_grad:
            return
        names = list(self.sums)
        inputs = [self.x_CD if name == "features" else self.own[name] for name in names]
        if scale_C1 is not None:
            gradient_CV = gradient_CV.mul_(scale_C1)
        upstream = gradient_CV.to(self.raw_CV.dtype)
        found = torch.autograd.grad(self.raw_CV, inputs, upstream, allow_unused=True)
        for name, gradient in zip(names, found):
            if gradient is not None:
                total = self.sums[name][part] if name == "features" else self.sums[name]
                total += gradient

    def _check(self) -> None:
        """Raise where the logits depend on a tensor whose gradient would be lost."""
        known = {id(self.x_CD), *(id(parameter) for parameter in self.own.values())}
        waiting, visited = [self.raw_CV.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            if isinstance(node, _Leaf) and id(node.variable) not in known:
                raise RuntimeError(
                    f"{type(self.head).__name__}: its logits depend on a tensor of shape "
                    f"{tuple(node.variable.shape)} that needs a gradient and is not its parameter"
                )
            waiting += [before for before, _ in node.next_functions]
