"""What a checkpoint holds beyond the model, so that training goes on as if never interrupted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mdiff.errors import CheckpointError
from mdiff.optim import AveragedWeights

Optimizers = Sequence[torch.optim.Optimizer]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, each once, and the buffers that are saved, by name."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    saved = model.state_dict(keep_vars=True).items()
    buffers = {name: t for name, t in saved if not isinstance(t, nn.Parameter)}
    return parameters | buffers


def whole(tensor: Tensor, into: Tensor | None = None) -> Tensor:
    """A copy on the CPU of all of a tensor, in the memory of `into` where that fits.

    Where the tensor is sharded, every process must call.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if into is not None and into.shape == tensor.shape and into.dtype == tensor.dtype:
        return into.copy_(tensor)
    return tensor.to("cpu", copy=True).contiguous()


def capture(
    model: nn.Module, optimizers: Optimizers, averaged: AveragedWeights | None,
    *, into: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Copies of the weights, their averages and the optimisers' state, by flat names.

    `weights/NAME`, `averaged/NAME`, `optim/INDEX/NAME/KEY`; complete also where they are
    sharded over processes, all of which must call this. `into` is what an earlier call gave,
    whose memory is written over: fresh memory takes twice as long as the copies.
    """
    found = {f"weights/{name}": tensor for name, tensor in model_tensors(model).items()}
    if averaged is not None:
        found |= {f"averaged/{name}": tensor for name, tensor in averaged.tensors.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            prefix = f"optim/{index}/{names[id(parameter)]}"
            found |= {f"{prefix}/{key}": value for key, value in state.items()}
    return {name: whole(tensor, (into or {}).get(name)) for name, tensor in found.items()}


def restore(
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizers: Optimizers,
    averaged: AveragedWeights | None,
) -> None:
    """Put back what `capture` gave.

    Raises CheckpointError, with nothing changed, where it does not fit.
    """
    targets = {f"weights/{name}": tensor for name, tensor in model_tensors(model).items()}
    if averaged is not None:
        targets |= {f"averaged/{name}": tensor for name, tensor in averaged.tensors.items()}
    states = {name: t for name, t in tensors.items() if name.startswith("optim/")}
    _check(targets, {name: t for name, t in tensors.items() if name not in states})
    parameters = dict(model.named_parameters())
    placed = []
    for name, tensor in states.items():
        _, index, rest = name.split("/", 2)
        owner, _, key = rest.rpartition("/")
        if not index.isdecimal() or int(index) >= len(optimizers) or owner not in parameters:
            raise CheckpointError(f"training state: {name!r} belongs to no parameter here")
        parameter = parameters[owner]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise CheckpointError(f"training state: {name!r} has shape {tuple(tensor.shape)}")
        placed.append((optimizers[int(index)], parameter, key, tensor))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_as(tensors[name], target))
    for optimizer, parameter, key, tensor in placed:
        # AdamW keeps its scalar step count on the CPU, wherever the parameter is.
        value = _as(tensor, parameter) if tensor.dim() else tensor
        optimizer.state[parameter][key] = value


def model_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict to publish from a captured `state`: averaged weights where there are any.

    Names that share a parameter (a tied head) share the tensor.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    published = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = first.get(id(tensor), name)
        published[name] = state.get(f"averaged/{source}", state.get(f"weights/{source}"))
    return {name: tensor for name, tensor in published.items() if tensor is not None}


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """The whole tensor on the device, or cut into the shards, of another."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def _check(targets: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless names, shapes and types are the same."""
    for name in sorted(targets.keys() ^ tensors.keys()):
        where = "is not in the checkpoint" if name in targets else "is not in this model"
        raise CheckpointError(f"training state: {name!r} {where}")
    for name, target in targets.items():
        got = tensors[name]
        if got.shape != target.shape or got.dtype != target.dtype:
            raise CheckpointError(
                f"training state: {name!r} is {tuple(got.shape)} {got.dtype}, expected "
                f"{tuple(target.shape)} {target.dtype}"
            )
