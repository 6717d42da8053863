"""Optimisers, learning rates and averaged weights: each rate is a function of the step alone."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mdiff.training.recipe import Optim

# Newton-Schulz coefficients and steps of Jordan (2024): steep at zero, so that five suffice.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# The root mean square of an AdamW update in practice (Liu et al. 2025, section 2.2).
ADAMW_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan 2024), for matrices (rows, columns).

    B <- momentum B + G; O = NewtonSchulz(G + momentum B); W <- (1 - lr decay) W - lr s O, with
    s = 0.2 sqrt(max(rows, columns)) for scale "rms" (Liu et al. 2025, eq. 4) and
    sqrt(max(1, rows / columns)) for "spectral". A weight that stacks several matrices has their
    number as its attribute `parts`; each is then updated on its own. Unlike torch.optim.Muon,
    whose iteration is always in bfloat16, float64 gradients are orthogonalised in float64.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95,
        weight_decay: float = 0.0, scale: str = "rms",
    ) -> None:  # fmt: skip
        # A group for each number of parts: sharding replaces parameters and their attributes.
        groups: dict[int, list[nn.Parameter]] = {}
        for weight in params:
            groups.setdefault(vars(weight).get("parts", 1), []).append(weight)
        rms = scale == "rms"
        super().__init__(
            [{"params": weights, "parts": parts} for parts, weights in groups.items()],
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rms": rms},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix with a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight.grad)
                buffer = self.state[weight]["momentum_buffer"]
                buffer.mul_(group["momentum"]).add_(weight.grad)
                ahead = weight.grad.add(buffer, alpha=group["momentum"])
                self.move(weight, ahead, group)

    def move(self, weight: Tensor, ahead: Tensor, group: dict[str, Any]) -> None:
        """Decay a weight and move it by s O of `ahead`, which is G + momentum B.

        A matrix that is sharded over processes is gathered, and sharded again afterwards.
        """
        parts = group["parts"]
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        update = torch.cat([orthogonalised(part) for part in whole.chunk(parts)])
        if isinstance(ahead, DTensor):
            update = distribute_tensor(
                update, ahead.device_mesh, ahead.placements, src_data_rank=None
            )
        rows, columns = math.ceil(weight.shape[0] / parts), weight.shape[1]
        size = ADAMW_RMS * math.sqrt(max(rows, columns))
        if not group["rms"]:
            size = math.sqrt(max(1.0, rows / columns))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update.to(weight.dtype), alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Approximately U V^T of the matrix U S V^T: its singular values are all about 1.

    Five steps of X <- a X + (b A + c A A) X, A = X X^T, in bfloat16, or in float64 where the
    matrix is.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    wide = wide.T if tall else wide
    # The floor is for a gradient of zeros; any other matrix is far above it.
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    result: Tensor = wide.T if tall else wide
    return result


def optimizers(model: nn.Module, settings: Optim) -> list[torch.optim.Optimizer]:
    """The optimisers of the model's parameters, each group with its `initial_lr`.

    Weight decay is for matrices that are not embeddings. Under "muon" the matrices of linear
    layers inside the model are Muon's; embeddings, the head, vectors and the rest AdamW's.
    """
    outside = _embeddings_and_heads(model)
    groups = {name: list[nn.Parameter]() for name in ("muon", "adamw", "plain")}
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() == 2 and id(parameter) not in outside
            groups[settings.name if is_matrix else "plain"].append(parameter)
    made: list[torch.optim.Optimizer] = []
    if groups["muon"]:
        made.append(Muon(
            groups["muon"], lr=settings.lr, momentum=settings.momentum,
            weight_decay=settings.weight_decay, scale=settings.muon_scale,
        ))  # fmt: skip
    decays = (("adamw", settings.weight_decay), ("plain", 0.0))
    rate = settings.lr if settings.name == "adamw" else settings.adam_lr or settings.lr
    adam = [{"params": groups[name], "weight_decay": each} for name, each in decays if groups[name]]
    if adam:
        made.append(torch.optim.AdamW(adam, lr=rate, betas=settings.betas, eps=settings.eps))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


@runtime_checkable
class _GivesOutput(Protocol):
    """A module of transformers, which names its output layer."""

    def get_output_embeddings(self) -> object: ...


@runtime_checkable
class _WithHead(Protocol):
    """A module whose output layer is `head`."""

    head: object


def _embeddings_and_heads(model: nn.Module) -> set[int]:
    """The ids of weights that hold one row for each token: embeddings and the output layer."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        head = module.get_output_embeddings() if isinstance(module, _GivesOutput) else None
        if head is None and isinstance(module, _WithHead):
            head = module.head
        if isinstance(head, nn.Module):
            found |= {id(parameter) for parameter in head.parameters()}
    return found


def rate_at(step: int, *, steps: int, settings: Optim) -> float:
    """The factor of all rates in step 1, 2, ..., `steps`.

    (step / warm-up) up to the end of the warm-up, then from 1 down towards `final_lr`, which the
    step after the last would have, along half a cosine or a line; or constant.
    """
    warm = settings.warmup_steps
    if step <= warm:
        return step / warm
    if settings.schedule == "constant":
        return 1.0
    done = (step - 1 - warm) / max(1, steps - warm)
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return settings.final_lr + (1 - settings.final_lr) * left


class AveragedWeights:
    """An exponential moving average of parameters, or this process's parts of them, by name.

    After step n the decay is min(decay, (1 + n) / (10 + n)), so that early averages forget the
    initial weights (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], *, step: int) -> None:
        """Move the average towards the parameters after step 1, 2, ..."""
        keep = min(self.decay, (1 + step) / (10 + step))
        towards = [parameters[name].detach() for name in self.tensors]
        torch._foreach_lerp_(list(self.tensors.values()), towards, 1 - keep)
