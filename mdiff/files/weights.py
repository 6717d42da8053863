"""Weights of safetensors files into a module, once every tensor is accounted for.

Files are read tensor by tensor into the memory that the module keeps, without a map of the file
and without a second copy, so that a model takes little more memory than its files.
"""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mdiff.errors import CheckpointError, MdiffWarning
from mdiff.files.untrusted import TYPES, Header

# The name of a submodule -> its device; "" is the whole module.
DeviceMap = Mapping[str, torch.device | str | int]
# Names in a message; the others are counted.
SHOWN = 4
# An attribute of modules whose weights may be of another type than the model's.
ANY = "of_any_type"
INITIALISERS = frozenset(x for x in vars(nn.init).values() if isinstance(x, FunctionType))


class _NoInitialValues(TorchFunctionMode):
    """Leaves the functions of `torch.nn.init` out."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        kwargs = kwargs or {}
        if func in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules made within take no memory: they are on the meta device, for `load_weights`.

    torch draws initial values there too, by code whose import takes longer than a small model.
    """
    with torch.device("meta"), _NoInitialValues():
        yield


def load_weights(
    module: nn.Module,
    headers: Mapping[Path, Header],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | DeviceMap | str = "cpu",
    tied: Mapping[str, str] | None = None,
) -> set[str]:
    """Give a module made on the meta device its tensors from safetensors files.

    `headers` are the checked headers of the files (see `read_headers`); their names are those of
    `module.state_dict()`. `tied` names may be absent and then share another's tensor, as they do
    where both are there and equal. Returns the names that the files hold. `dtype` is what
    floating parameters become; None keeps what is stored, or is the type of most where they are of
    several (see `one_type`; modules that are `of_any_type` excepted). Buffers (tables of positions,
    say) always keep theirs. `device` may map the name of a submodule ("" is the whole) to its
    device. Raises CheckpointError, with nothing allocated, where a tensor is missing, unexpected
    or of another shape, and lists them.
    """
    tied = dict(tied or {})
    _account(module, headers, tied)
    learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if dtype is None:
        any_type = {n for n in learned if vars(module.get_submodule(n.rpartition(".")[0])).get(ANY)}
        learned -= any_type
        dtype = one_type(headers, learned)
    for path, header in headers.items():
        with path.open("rb", buffering=0) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                file.seek(start + entry["data_offsets"][0])
                tensor = torch.empty(entry["shape"], dtype=TYPES[entry["dtype"]], device="cpu")
                _fill(tensor, file, path)
                cast = dtype is not None and tensor.is_floating_point() and name in learned
                kind = dtype if cast else tensor.dtype
                _put(module, name, tensor.to(device=_device_of(name, device), dtype=kind))
    tensors = module.state_dict(keep_vars=True)
    for name, source in tied.items():
        if tensors[name].is_meta or torch.equal(tensors[name], tensors[source]):
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, tensors[source])
    return {name for header in headers.values() for name in header}


def one_type(headers: Mapping[Path, Header], names: Set[str] | None = None) -> torch.dtype | None:
    """The type of most weights, with a warning, where files hold them in several; None for one.

    `names` are those of the weights, by default all tensors with floating numbers.
    """
    counts: Counter[str] = Counter()
    for header in headers.values():
        for name, entry in header.items():
            kind = TYPES.get(entry["dtype"])
            if kind is not None and kind.is_floating_point and (names is None or name in names):
                counts[entry["dtype"]] += math.prod(entry["shape"])
    if len(counts) < 2:
        return None
    (most, _), *others = counts.most_common()
    warnings.warn(
        f"{next(iter(headers)).parent} holds weights of several types: those of "
        f"{', '.join(kind for kind, _ in others)} are read as {most}, that of most; dtype= sets it",
        MdiffWarning, stacklevel=2,
    )  # fmt: skip
    return TYPES[most]


def problems(
    module: nn.Module, headers: Mapping[Path, Header], tied: Mapping[str, str]
) -> dict[str, list[str]]:
    """What is wrong with the tensors that the module cannot take: a line for each, by the kind."""
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    every = {name: entry for header in headers.values() for name, entry in header.items()}
    found = {name: entry["shape"] for name, entry in every.items()}
    return {
        "missing": [n for n in wanted if n not in found and n not in tied],
        "unexpected": [n for n in found if n not in wanted],
        "of another shape": [
            f"{n} {found[n]}, expected {wanted[n]}"
            for n in wanted
            if n in found and found[n] != wanted[n]
        ],
        "of a type that is not read": [
            f"{n} {every[n]['dtype']}"
            for n in wanted
            if n in found and every[n]["dtype"] not in TYPES
        ],
        # A cast of whole numbers to weights would be other weights.
        "of another type": [
            f"{n} {every[n]['dtype']}, expected floating numbers"
            for n, x in module.named_parameters()
            if n in found
            and x.is_floating_point()
            and every[n]["dtype"] in TYPES
            and not TYPES[every[n]["dtype"]].is_floating_point
        ],
    }


def _account(module: nn.Module, headers: Mapping[Path, Header], tied: Mapping[str, str]) -> None:
    """Raise CheckpointError unless the files hold exactly what the module needs."""
    found = [
        f"{kind}: {', '.join(n[:120] for n in some[:SHOWN])}"
        + (f" and {len(some) - SHOWN} more" if len(some) > SHOWN else "")
        for kind, some in problems(module, headers, tied).items()
        if some
    ]
    if found:
        raise CheckpointError(f"{next(iter(headers)).parent}: tensors {'; '.join(found)}")


def _fill(tensor: Tensor, file: FileIO, path: Path) -> None:
    """Read a contiguous CPU tensor's bytes."""
    if tensor.numel() == 0:
        return
    view = tensor.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise CheckpointError(f"{path} is truncated or altered")
        done += got


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer of that name, keeping which of the two it is."""
    owner, _, last = name.rpartition(".")
    holder = module.get_submodule(owner)
    if last in holder._parameters:
        holder._parameters[last] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    else:
        holder._buffers[last] = tensor


def _device_of(name: str, device: torch.device | DeviceMap | str) -> torch.device:
    """The device of a tensor: of the longest submodule name in the map that begins its own."""
    if not isinstance(device, Mapping):
        return torch.device(device)
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        prefix = ".".join(parts[:count])
        if prefix in device:
            return torch.device(device[prefix])
    raise CheckpointError(f"{name} has no device in the map")
