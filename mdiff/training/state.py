"""The training state of a checkpoint: weights, averages and optimiser states, whole on the CPU.

torch.distributed.checkpoint gathers tensors that are sharded over processes, and shards whole
ones again; tensors that are not sharded pass through it alike. Names are flat:
`weights/NAME`, `averaged/NAME` and `optim/INDEX/NAME/KEY` by the optimiser's number, the
parameter and the optimiser's key.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    ValueType,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import DTensor

from mdiff.errors import CheckpointError
from mdiff.training.optim import AveragedWeights

Optimizers = Sequence[torch.optim.Optimizer]


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, each once, as a state dict names them."""
    first: dict[int, tuple[str, nn.Parameter]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def capture(
    model: nn.Module, optimizers: Optimizers, averaged: AveragedWeights | None,
    *, into: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Copies of the weights, their averages and the optimisers' states, by flat names.

    All processes must call this; the result of all but the first is empty. `into` is the result
    of an earlier call, whose memory is overwritten: allocating takes twice as long as copying.
    """
    live = dict(_live(model, averaged, optimizers))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = cast(dict[str, Tensor], get_model_state_dict(_numbered(live.values()), options=options))
    # What a GPU held is new memory already.
    memory = into or {}
    return {
        name: copied(tensor, into=memory.get(name)) if live[name].is_cpu else tensor
        for name, tensor in zip(live, whole.values())
    }


def check(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Optimizers,
    averaged: AveragedWeights | None,
) -> None:  # fmt: skip
    """Raise CheckpointError unless the result of `capture` fits, here or of another sharding."""
    live = dict(_live(model, averaged))
    stated = {name for name in tensors if name.startswith("optim/")}
    for name in sorted(live.keys() ^ (tensors.keys() - stated)):
        where = "is not in the checkpoint" if name in live else "is not in this model"
        raise CheckpointError(f"training state: {name!r} {where}")
    for name, here in live.items():
        got = tensors[name]
        if got.shape != here.shape or got.dtype != here.dtype:
            raise CheckpointError(
                f"training state: {name!r} is {tuple(got.shape)} {got.dtype}, expected "
                f"{tuple(here.shape)} {here.dtype}"
            )
    named = parameters(model)
    for name in stated:
        number, owner, _ = _state_name(name)
        if not number.isdecimal() or int(number) >= len(optimizers) or owner not in named:
            raise CheckpointError(f"training state: {name!r} belongs to no parameter here")
        if tensors[name].dim() and tensors[name].shape != named[owner].shape:
            shape = tuple(tensors[name].shape)
            raise CheckpointError(f"training state: {name!r} has shape {shape}")


def restore(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Optimizers,
    averaged: AveragedWeights | None,
) -> None:  # fmt: skip
    """Set weights, averages and states to what the first process has in `tensors`, checked.

    All processes must call this; the `tensors` of the others are not read.
    """
    described = [[(name, t.dim(), t.dtype) for name, t in tensors.items()]]
    shared = dist.is_initialized()
    if shared:
        dist.broadcast_object_list(described)
    named = parameters(model)
    for optimizer in optimizers:
        optimizer.state.clear()
    for name, dim, dtype in described[0]:
        if name.startswith("optim/"):
            number, owner, key = _state_name(name)
            # AdamW keeps its scalar count of steps on the CPU, wherever the parameter is.
            like = named[owner] if dim else torch.empty(())
            state = optimizers[int(number)].state[named[owner]]
            state[key] = torch.zeros_like(like, dtype=dtype)
    live = dict(_live(model, averaged, optimizers))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=shared)
    wholes: dict[str, ValueType] = {}
    if tensors:
        wholes = {str(i): tensors[name] for i, name in enumerate(live)}
    set_model_state_dict(_numbered(live.values()), wholes, options=options)


def copied(tensor: Tensor, *, into: Tensor | None) -> Tensor:
    """A copy on the CPU, in the memory of `into` where its shape and type are the same."""
    tensor = tensor.detach()
    if into is not None and into.shape == tensor.shape and into.dtype == tensor.dtype:
        return into.copy_(tensor)
    return tensor.to("cpu", copy=True).contiguous()


def model_weights(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict to publish from a captured `state`: averaged weights where there are any.

    Names that share a parameter (a tied head) share the tensor.
    """
    first = {id(parameter): name for name, parameter in parameters(model).items()}
    published = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = first.get(id(tensor), name)
        published[name] = state.get(f"averaged/{source}", state.get(f"weights/{source}"))
    return {name: tensor for name, tensor in published.items() if tensor is not None}


def _live(
    model: nn.Module, averaged: AveragedWeights | None, optimizers: Optimizers = ()
) -> Iterator[tuple[str, Tensor]]:
    """The weights, saved buffers, averages and optimisers' states themselves, sharded or not.

    Not by torch's `get_optimizer_state_dict`: where no step was taken it takes one.
    """
    for name, parameter in parameters(model).items():
        yield f"weights/{name}", parameter.detach()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, nn.Parameter):
            yield f"weights/{name}", tensor
    for name, tensor in averaged.tensors.items() if averaged is not None else ():
        yield f"averaged/{name}", tensor
    names = {id(parameter): name for name, parameter in parameters(model).items()}
    for index, optimizer in enumerate(optimizers):
        for owner, state in optimizer.state.items():
            for key, value in state.items():
                yield f"optim/{index}/{names[id(owner)]}/{key}", value


def _state_name(name: str) -> tuple[str, str, str]:
    """The optimiser's number, the parameter and the key of a state.

    >>> _state_name("optim/0/head.weight/exp_avg")
    ('0', 'head.weight', 'exp_avg')
    """
    number, _, rest = name.removeprefix("optim/").partition("/")
    owner, _, key = rest.rpartition("/")
    return number, owner, key


def _numbered(tensors: Iterable[Tensor]) -> nn.Module:
    """A module with these tensors as its state, named 0, 1, ...: names of a module have no dots."""
    module = nn.Module()
    for number, tensor in enumerate(tensors):
        module.register_buffer(str(number), tensor)
    return module
