"""The training state of a checkpoint: weights, averages and optimiser states, whole on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mdiff.errors import CheckpointError
from mdiff.training.optim import AveragedWeights


class Placement(Protocol):
    """The parameters of a model and the states of its optimisers, sharded over processes or not.

    A *part* is this process's shard of a tensor, all of it where tensors are not sharded. Names
    are the model's; states are named INDEX/NAME/KEY by the optimiser's number, the parameter and
    the optimiser's key.
    """

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimisers, which states name by their number."""

    @property
    def allows_async_save(self) -> bool:
        """Whether another thread may read the module's structure (no values) during a step."""

    def parts(self) -> dict[str, Tensor]:
        """The part of every parameter, by name; steps write to it in place."""

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole parameter."""

    def whole(self, name: str, part: Tensor, *, into: Tensor | None) -> Tensor:
        """A copy on the CPU of the whole tensor of a `part`; see `copied`.

        It is sharded as parameter `name` is. All processes must call this.
        """

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """The part of a tensor of parameter `name`'s shape, on its device."""

    def load(self, wholes: dict[str, Tensor]) -> None:
        """Set every parameter to a whole value."""

    def states(self) -> dict[str, Tensor]:
        """The parts of the optimisers' states; a scalar is whole."""

    def load_states(self, wholes: dict[str, Tensor]) -> None:
        """Restore whole states; CheckpointError, with nothing changed, where they do not fit."""


class TorchPlacement:
    """A `Placement` of plain tensors, or of DTensors as FSDP2 makes them."""

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers

    @property
    def allows_async_save(self) -> bool:
        # FSDP2 replaces a layer's parameters by whole ones during a forward.
        return not any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def parts(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def shape(self, name: str) -> torch.Size:
        return self.model.get_parameter(name).shape

    def whole(self, name: str, part: Tensor, *, into: Tensor | None) -> Tensor:
        part = part.detach()
        return copied(part.full_tensor() if isinstance(part, DTensor) else part, into=into)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        like = self.model.get_parameter(name)
        if isinstance(like, DTensor):
            return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
        return whole.to(like.device)

    @torch.no_grad()
    def load(self, wholes: dict[str, Tensor]) -> None:
        for name, parameter in self.parts().items():
            parameter.copy_(self.cut(name, wholes[name]))

    def states(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.parts().items()}
        return {
            f"{index}/{names[id(parameter)]}/{key}": value
            for index, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_states(self, wholes: dict[str, Tensor]) -> None:
        for name, tensor in wholes.items():
            index, owner, key = state_name(name)
            # AdamW keeps its scalar step count on the CPU, wherever the parameter is.
            value = self.cut(owner, tensor) if tensor.dim() else tensor
            self.optimizers[index].state[self.model.get_parameter(owner)][key] = value


def copied(tensor: Tensor, *, into: Tensor | None) -> Tensor:
    """A copy on the CPU, in the memory of `into` where its shape and type are the same."""
    tensor = tensor.detach()
    if into is not None and into.shape == tensor.shape and into.dtype == tensor.dtype:
        return into.copy_(tensor)
    return tensor.to("cpu", copy=True).contiguous()


def state_name(name: str) -> tuple[int, str, str]:
    """The optimiser's number, the parameter and the key of a state.

    >>> state_name("0/head.weight/exp_avg")
    (0, 'head.weight', 'exp_avg')
    """
    index, _, rest = name.partition("/")
    owner, _, key = rest.rpartition("/")
    return int(index), owner, key


def capture(
    model: nn.Module, placement: Placement, averaged: AveragedWeights | None,
    *, keep: bool = True, into: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Copies of the weights, their averages and the optimisers' state, by flat names.

    `weights/NAME`, `averaged/NAME`, `optim/INDEX/NAME/KEY`, whole also where they are sharded
    over processes, all of which must call this; without `keep` the result is empty. `into` is
    the result of an earlier call, whose memory is overwritten: allocating takes twice as long
    as copying.
    """
    # Each with the parameter that it is sharded as; None is whole already.
    parts: dict[str, tuple[str | None, Tensor]] = {}
    for name, part in placement.parts().items():
        parts[f"weights/{name}"] = (name, part)
    for name, buffer in _buffers(model).items():
        parts[f"weights/{name}"] = (None, buffer)
    for name, part in averaged.tensors.items() if averaged is not None else ():
        parts[f"averaged/{name}"] = (name, part)
    for name, part in placement.states().items():
        parts[f"optim/{name}"] = (state_name(name)[1] if part.dim() else None, part)
    memory = into or {}
    kept = {}
    for name, (like, part) in parts.items():
        if like is not None:
            part = placement.whole(like, part, into=memory.get(name))
        elif keep:
            part = copied(part, into=memory.get(name))
        if keep:
            kept[name] = part
    return kept


def restore(
    tensors: dict[str, Tensor], model: nn.Module, placement: Placement,
    averaged: AveragedWeights | None,
) -> None:  # fmt: skip
    """Restore the result of `capture`, of this or another placement.

    Raises CheckpointError, with nothing changed, where it does not fit.
    """
    parts, buffers = placement.parts(), _buffers(model)
    shapes = {name: placement.shape(name) for name in parts}
    expected = {f"weights/{name}": (b.shape, b.dtype) for name, b in buffers.items()}
    expected |= {f"weights/{name}": (shapes[name], part.dtype) for name, part in parts.items()}
    if averaged is not None:
        for name, part in averaged.tensors.items():
            expected[f"averaged/{name}"] = (shapes[name], part.dtype)
    states = {n.removeprefix("optim/"): t for n, t in tensors.items() if n.startswith("optim/")}
    _check(expected, {n: t for n, t in tensors.items() if not n.startswith("optim/")})
    _check_states(shapes, len(placement.optimizers), states)
    placement.load_states(states)
    placement.load({name: tensors[f"weights/{name}"] for name in parts})
    with torch.no_grad():
        for name, buffer in buffers.items():
            buffer.copy_(tensors[f"weights/{name}"])
        for name, part in averaged.tensors.items() if averaged is not None else ():
            part.copy_(placement.cut(name, tensors[f"averaged/{name}"]))


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


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved, by name; they are never sharded."""
    saved = model.state_dict(keep_vars=True).items()
    return {name: t for name, t in saved if not isinstance(t, nn.Parameter)}


def _check_states(
    shapes: dict[str, torch.Size], optimizers: int, states: dict[str, Tensor]
) -> None:
    """Raise CheckpointError unless every state is of an optimiser and a parameter that exist."""
    for name, tensor in states.items():
        number, _, rest = name.partition("/")
        owner = rest.rpartition("/")[0]
        if not number.isdecimal() or int(number) >= optimizers or owner not in shapes:
            raise CheckpointError(f"training state: 'optim/{name}' belongs to no parameter here")
        if tensor.dim() and tensor.shape != shapes[owner]:
            raise CheckpointError(f"training state: 'optim/{name}' has shape {tuple(tensor.shape)}")


def _check(expected: dict[str, tuple[torch.Size, torch.dtype]], tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless names, shapes and types are the same."""
    for name in sorted(expected.keys() ^ tensors.keys()):
        where = "is not in the checkpoint" if name in expected else "is not in this model"
        raise CheckpointError(f"training state: {name!r} {where}")
    for name, (shape, dtype) in expected.items():
        got = tensors[name]
        if got.shape != shape or got.dtype != dtype:
            raise CheckpointError(
                f"training state: {name!r} is {tuple(got.shape)} {got.dtype}, expected "
                f"{tuple(shape)} {dtype}"
            )
