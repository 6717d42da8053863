"""Slices of parameters as ZeRO-3 cuts them, and what is done to them alike for all.

A parameter of n numbers is flattened, padded at its end to a multiple of the processes and cut
into as many slices. The engine keeps the slices of a group of parameters in one flat tensor, the
parameter of its optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mdiff.errors import CheckpointError
from mdiff.training.optim import Muon, orthogonal_parts, update_size
from mdiff.training.state import copied, state_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    class Sliced(nn.Parameter):
        """A parameter with what DeepSpeed sets on it: its slice, whole size and shape."""

        ds_tensor: Tensor
        ds_numel: int
        ds_shape: torch.Size
        ds_process_group: ProcessGroup


# AdamW's count of steps: all else that our optimisers keep has the shape of the parameter.
STEP = "step"


def whole_of(parameter: Sliced, part: Tensor) -> Tensor:
    """All of what `part`, cut as the parameter is, is this process's slice of; all must call."""
    group = parameter.ds_process_group
    flat = part.new_empty(part.numel() * dist.get_world_size(group))
    dist.all_gather_into_tensor(flat, part.contiguous(), group=group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def slice_of(parameter: Sliced, whole: Tensor) -> Tensor:
    """The slice on this process of a tensor of the parameter's shape, padded with zeros."""
    size = parameter.ds_tensor.numel()
    start = size * dist.get_rank(parameter.ds_process_group)
    held = whole.reshape(-1)[start : start + size]
    return torch.nn.functional.pad(held, (0, size - held.numel()))


class Flat(NamedTuple):
    """One flat tensor of the engine, and the parameters whose slices lie in it in a row."""

    tensor: Tensor
    parameters: Sequence[Sliced]
    group: int

    def pieces(self, flat: Tensor) -> Iterator[tuple[Sliced, Tensor]]:
        """Every parameter with its slice of a tensor that is laid out as this one, as a view."""
        sizes = [parameter.ds_tensor.numel() for parameter in self.parameters]
        return zip(self.parameters, torch.split(flat, sizes), strict=True)


def flats_of(engine_optimizer: Any) -> list[Flat]:
    """The flat tensors of DeepSpeed's stage 3 optimiser, in its order."""
    groups = engine_optimizer.sub_group_to_group_id
    return [
        Flat(tensor, parameters, groups[number])
        for number, (tensor, parameters) in enumerate(
            zip(
                engine_optimizer.fp32_partitioned_groups_flat,
                engine_optimizer.fp16_groups,
                strict=True,
            )
        )
    ]


class SlicedMuon(Muon):
    """Muon on flat tensors of slices: each matrix is put together, and cut again after.

    It continues with the groups of the Muon that it is made of. `flats` is filled later, when the
    engine exists.
    """

    def __init__(self, muon: Muon, flats: list[Flat]) -> None:
        torch.optim.Optimizer.__init__(self, muon.param_groups, muon.defaults)
        self.flats = flats

    def move(self, weight: Tensor, ahead: Tensor, group: dict[str, Any]) -> None:
        """See `Muon.move`; `weight` and `ahead` are flat."""
        flat = next(flat for flat in self.flats if flat.tensor is weight)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        for (parameter, held), (_, towards) in zip(flat.pieces(weight), flat.pieces(ahead)):
            whole = orthogonal_parts(whole_of(parameter, towards), group["parts"])
            update = slice_of(parameter, whole).to(held.dtype)
            held.add_(update, alpha=-group["lr"] * update_size(whole.shape, group))


class Joined(torch.optim.Optimizer):
    """Several optimisers as one: their groups in a row, their states in one mapping.

    The engine puts one flat tensor after the other into its group and calls `step`: the
    optimisers whose groups are empty then do nothing.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for o in optimizers for group in o.param_groups], {})
        self.flats: list[Flat] = []
        self.optimizers = [
            SlicedMuon(o, self.flats) if isinstance(o, Muon) else o for o in optimizers
        ]
        # The number of the optimiser of each group.
        self.owners = [i for i, o in enumerate(optimizers) for _ in o.param_groups]
        for optimizer in self.optimizers:
            optimizer.state = self.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of what the groups hold."""
        for optimizer in self.optimizers:
            optimizer.step()


class ZeroPlacement:
    """A `Placement` of parameters in slices."""

    # Within a forward pass the engine gathers what a module is asked for, by all processes.
    allows_async_save = False

    def __init__(self, model: nn.Module, joined: Joined, package: ModuleType) -> None:
        self.optimizers = joined.optimizers
        self.joined, self.package = joined, package
        self.parameters: dict[str, Any] = dict(model.named_parameters())
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}

    def parts(self) -> dict[str, Tensor]:
        return {name: parameter.ds_tensor.detach() for name, parameter in self.parameters.items()}

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self.parameters[name].ds_shape)

    def whole(self, name: str, part: Tensor, *, into: Tensor | None) -> Tensor:
        return copied(whole_of(self.parameters[name], part), into=into)

    def cut(self, name: str, whole: Tensor) -> Tensor:
        parameter = self.parameters[name]
        return slice_of(parameter, whole).to(parameter.ds_tensor.device)

    @torch.no_grad()
    def load(self, wholes: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            # Small parameters are kept whole besides: the engine has to know of the change.
            with self.package.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(wholes[name])
        # The engine steps copies of its own, which it then writes over the parameters.
        for flat in self.joined.flats:
            for parameter, held in flat.pieces(flat.tensor):
                held.copy_(slice_of(parameter, wholes[self.names[id(parameter)]]))

    def states(self) -> dict[str, Tensor]:
        found = {}
        for flat in self.joined.flats:
            owner = self.joined.owners[flat.group]
            for key, value in self.joined.state.get(flat.tensor, {}).items():
                for parameter, part in flat.pieces(flat.tensor if key == STEP else value):
                    name = f"{owner}/{self.names[id(parameter)]}/{key}"
                    found[name] = value if key == STEP else part
        return found

    def load_states(self, wholes: dict[str, Tensor]) -> None:
        """All parameters of a flat tensor have the same keys and scalars."""
        made = [self._flat_state(flat, wholes) for flat in self.joined.flats]
        for flat, state in zip(self.joined.flats, made, strict=True):
            self.joined.state[flat.tensor] = state

    def _flat_state(self, flat: Flat, wholes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of a flat tensor from those of its parameters."""
        owner = self.joined.owners[flat.group]
        kept: dict[str, dict[str, Tensor]] = {self.names[id(p)]: {} for p in flat.parameters}
        for name, whole in wholes.items():
            index, parameter, key = state_name(name)
            if index == owner and parameter in kept:
                kept[parameter][key] = whole
        first, *others = kept
        for other in others:
            if kept[first].keys() != kept[other].keys() or any(
                key == STEP and not torch.equal(kept[first][key], kept[other][key])
                for key in kept[first]
            ):
                raise CheckpointError(
                    f"training state: {first!r} and {other!r} are not at the same step, and "
                    "ZeRO-3 steps them together: expected a run of one process, DDP or FSDP2"
                )
        state = {}
        for key, value in kept[first].items():
            parts = (slice_of(p, kept[self.names[id(p)]][key]) for p in flat.parameters)
            # The optimiser keeps its count of steps on the CPU.
            state[key] = value if key == STEP else torch.cat(list(parts)).to(flat.tensor.device)
        return state
