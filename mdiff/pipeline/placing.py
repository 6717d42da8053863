"""Where the parts of a published model lie: on one device where it fits, else on several.

Accelerate plans and moves: `infer_auto_device_map` over the module without weights,
`dispatch_model` over the module with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from mdiff.backbones.layers import Backbone
from mdiff.errors import BackendError, CheckpointError
from mdiff.files import TYPES, ModelFiles
from mdiff.pipeline.published import filled

AUTO = "auto"
# Of a module's name in a device map: the whole.
WHOLE = ""
DISK = "disk"
# The name of a submodule -> its device.
DeviceMap = Mapping[str, Any]


def planned(
    module: Backbone,
    files: ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    max_memory: Mapping[Any, Any] | None = None,
) -> dict[str, Any]:
    """The device of each part, {"": device} where one device holds all.

    GPUs are filled first, then the CPU. `max_memory` {device: bytes} is by default what is free.
    Raises BackendError where the devices together cannot hold the model.
    """
    from accelerate import infer_auto_device_map

    learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    stored = {
        name: TYPES[entry["dtype"]]
        for name, entry in files.entries.items()
        if entry["dtype"] in TYPES
    }
    kinds = {
        name: dtype if dtype is not None and kind.is_floating_point and name in learned else kind
        for name, kind in stored.items()
    }
    found: dict[str, Any] = infer_auto_device_map(
        module, max_memory=max_memory, no_split_module_classes=list(module.no_split),
        special_dtypes=kinds,
    )  # fmt: skip
    if DISK in found.values():
        raise BackendError(f"{files.folder} is larger than the memory of the devices here together")
    return {WHOLE: next(iter(found.values()))} if len(set(found.values())) == 1 else found


def spread(
    module: Backbone, files: ModelFiles, places: DeviceMap, *, dtype: torch.dtype | None = None
) -> Backbone:
    """The module from `families.built` with its weights read to the devices of `places`.

    What lies on the CPU beside a GPU is copied there as it is used. A call takes tokens on
    `module.main_device`, the first GPU if there is one, and gives logits there. Raises
    CheckpointError where a tensor has no device in `places`.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    strange = [name for name in places if name and not _is_part(module, name)]
    if strange:
        raise CheckpointError(
            f"{files.folder}: the device map names {strange[0]!r}, which is no part"
        )
    filled(module, files, dtype=dtype, device={k: torch.device(d) for k, d in places.items()})
    devices = [torch.device(device) for device in places.values()]
    module.main_device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    if set(places) == {WHOLE}:
        return module
    module.eval()
    with warnings.catch_warnings():
        # A tensor of the module itself is a part of its own, which accelerate remarks on.
        warnings.filterwarnings("ignore", message="The following device_map keys")
        dispatch_model(module, dict(places), main_device=module.main_device, force_hooks=True)
    # Features and logits are the caller's: they come back to where its tokens are.
    back = AlignDevicesHook(io_same_device=True)
    add_hook_to_module(module.head, back, append=True)
    return module


def _is_part(module: Backbone, name: str) -> bool:
    return any(n == name or n.startswith(f"{name}.") for n in module.state_dict())
