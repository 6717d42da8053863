"""The backbone that a config.json is for, its module with the weights, and the ids it generates.

On several devices accelerate plans and moves: `infer_auto_device_map` over the module without
weights, `dispatch_model` over the module with them.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mdiff.backbones.layers import Backbone, check_settings
from mdiff.errors import BackendError, CheckpointError, ConfigError, nearest
from mdiff.files import CONFIG, TYPES, DeviceMap, ModelFiles, load_weights, without_memory
from mdiff.find import find, module_of, names
from mdiff.modalities import HasSpecialTokens
from mdiff.pipeline.options import Model

# What may be done with a tokenizer's special tokens: generate them, read them in prompts.
SPECIAL = ("none", "drawn", "typed", "all")
# What the model_type of our own architectures begins with.
OURS = "mdiff-"
# What AutoModelForMaskedLM takes, whatever comes before it.
MASKED_LM = "ForMaskedLM"
ANY = f"any ...{MASKED_LM}"
AUTO = "auto"
# In a device map: the whole model, and the device that stands for "does not fit".
WHOLE, DISK = "", "disk"


class Claim(NamedTuple):
    """Which configs are a backbone's own: by the architectures that they name, or by their keys."""

    architectures: tuple[str, ...]
    recognises: Callable[[Mapping[str, object]], bool] | None


def published_backbones() -> dict[str, Claim]:
    """The backbones of other projects, by name."""
    found = {}
    for name in names("backbones"):
        entries = vars(module_of("backbones", name))
        claim = Claim(tuple(entries.get("ARCHITECTURES", ())), entries.get("recognises"))
        if claim.architectures or claim.recognises:
            found[name] = claim
    return found


def recognised(files: ModelFiles) -> str | None:
    """The name of the backbone whose config.json is in these files; None where none claims it."""
    return family_of(files.config, origin=str(files.folder / CONFIG))


def own_backbone(files: ModelFiles) -> str | None:
    """The name of our own backbone that a config.json is of; None for another project's.

    Its model_type is the name of its file; any other name there imports nothing.
    """
    kind = str(files.config.get("model_type"))
    name = kind.removeprefix(OURS).replace("-", "_")
    return name if kind.startswith(OURS) and name in names("backbones") else None


def family_of(config: Mapping[str, object], *, origin: str = CONFIG) -> str | None:
    """The name of the backbone that claims a config; None where none does.

    By the architecture that the config names; by its keys only where it names none. `origin` is
    what a CheckpointError names.
    """
    named = _architectures(config, origin)
    for name, claim in published_backbones().items():
        if set(named) & set(claim.architectures):
            return name
        if not named and claim.recognises is not None and claim.recognises(config):
            return name
    return None


def _architectures(config: Mapping[str, object], origin: str) -> list[str]:
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{origin}: architectures: expected a list of names")
    return named


def supported() -> list[str]:
    """The architectures of other projects that have a file here."""
    return sorted(name for claim in published_backbones().values() for name in claim.architectures)


def unsupported(files: ModelFiles) -> CheckpointError | None:
    """Why no backbone opens a model that none recognises; None for a masked LM of transformers."""
    from mdiff.modalities.image import codec_kind

    named = _architectures(files.config, str(files.folder / CONFIG))
    if codec_kind(files.config):
        return codec_alone(files.folder)
    if not named:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        kind = str(files.config.get("model_type"))[:80]
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return None
        return CheckpointError(
            f"{files.folder} names no architecture (model_type {kind}): not supported; "
            f"known: {', '.join([*supported(), ANY])}"
        )
    other = next((name for name in named if not name.endswith(MASKED_LM)), None)
    if other is None:
        return None
    known = nearest(other[:80], [*supported(), ANY])
    return CheckpointError(f"{files.folder} is a {other[:80]}, which is not supported; {known}")


def codec_alone(folder: Path) -> CheckpointError | None:
    """The error for the folder of a codec, known or not; None for any other."""
    from mdiff.modalities.image import holds_codec, unknown_codec

    if not holds_codec(folder):
        return unknown_codec(folder)
    return CheckpointError(f"{folder} is a codec, not a model: see mdiff tokenizer")


def load_backbone(
    files: ModelFiles, *, dtype: torch.dtype | None, device: torch.device | DeviceMap | str
) -> Backbone | None:
    """The model of a backbone of ours or of another project; None where none claims the config.

    `device` may be AUTO or a map of several, see `planned` and `spread`. Raises ConfigError for
    a model whose family refuses to generate.
    """
    own = own_backbone(files)
    if own is not None:
        check_settings(files)
    family = own or recognised(files)
    if family is None:
        return None
    try:
        module = built(family, files.config)
    except RuntimeError as error:
        # torch's, for sizes whose product overflows.
        raise CheckpointError(f"{files.folder / CONFIG} is not valid: {error}") from error
    if module.refused is not None:
        raise ConfigError(f"{files.folder} cannot be used: {module.refused}")
    if isinstance(device, torch.device):
        return filled(module, files, dtype=dtype, device=device)
    plan = planned(module, files, dtype=dtype) if isinstance(device, str) else device
    return spread(module, files, plan, dtype=dtype)


def load_published(
    files: ModelFiles,
    family: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | DeviceMap | str = "cpu",
) -> Backbone:
    """The model of these files, whose backbone is `family`, with its weights on `device`."""
    return filled(built(family, files.config), files, dtype=dtype, device=device)


def filled(
    module: Backbone,
    files: ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | DeviceMap | str = "cpu",
) -> Backbone:
    """The module from `built` with the weights in these files; see `load_weights`."""
    stored = load_weights(module, files.headers, dtype=dtype, device=device, tied=module.tied)
    module.stored = frozenset(stored)
    return module


def built(family: str, config: Mapping[str, object]) -> Backbone:
    """The module of a config, without memory for its weights (on the meta device).

    Raises CheckpointError for quantised weights and for what the family refuses.
    """
    if (quantised := config.get("quantization_config")) is not None:
        raise CheckpointError(f"{CONFIG}: quantization_config={quantised!r:.80} is not supported")
    with without_memory():
        module: Backbone = find("backbones", family)(config)
    return module


def planned(
    module: Backbone,
    files: ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    max_memory: Mapping[int | str, int] | None = None,
) -> dict[str, torch.device | str | int]:
    """The device of each part, {"": device} where one device holds all.

    GPUs are filled first, then the CPU. `max_memory` {device: bytes} is by default what is free.
    Raises BackendError where the devices together cannot hold the model.
    """
    from accelerate import infer_auto_device_map

    learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    kinds = {
        name: kind if dtype is None or not kind.is_floating_point or name not in learned else dtype
        for name, entry in files.entries.items()
        if (kind := TYPES.get(entry["dtype"])) is not None
    }
    found: dict[str, torch.device | str | int] = infer_auto_device_map(
        module, max_memory=max_memory, no_split_module_classes=list(module.no_split),
        special_dtypes=kinds,
    )  # fmt: skip
    if DISK in found.values():
        raise BackendError(f"{files.folder} is larger than the memory of the devices here together")
    return {WHOLE: next(iter(found.values()))} if len(set(found.values())) == 1 else found


def spread(
    module: Backbone, files: ModelFiles, devices: DeviceMap, *, dtype: torch.dtype | None = None
) -> Backbone:
    """The module from `built` with its weights read to `devices`, by the name of a submodule.

    Parts on the CPU are copied to the GPU, if there is one, as they are used. A call takes
    tokens on `module.main_device`, the first GPU if there is one, and gives logits there.
    Raises CheckpointError where a tensor has no device in the map.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    tensors = module.state_dict()
    for part in devices:
        if part and not any(name == part or name.startswith(f"{part}.") for name in tensors):
            raise CheckpointError(
                f"{files.folder}: the device map names {part!r}, which is no part"
            )
    each = {name: torch.device(device) for name, device in devices.items()}
    filled(module, files, dtype=dtype, device=each)
    module.main_device = next((d for d in each.values() if d.type != "cpu"), torch.device("cpu"))
    if set(devices) == {WHOLE}:
        return module
    module.eval()
    with warnings.catch_warnings():
        # A tensor of the module itself is a part of its own, of which accelerate warns.
        warnings.filterwarnings("ignore", message="The following device_map keys")
        dispatch_model(module, dict(devices), main_device=module.main_device, force_hooks=True)
    # Features and logits are the caller's: they come back to where its tokens are.
    back = AlignDevicesHook(io_same_device=True)
    add_hook_to_module(module.head, back, append=True)
    return module


def check_mask_id(given: int | None, stated: int | None) -> None:
    """Raise ConfigError for a mask id other than the one that the model itself states."""
    if given not in (None, stated):
        raise ConfigError(
            f"mask_id={given}: this model states its own mask id {stated}; --mask-id is for "
            "published text models without one"
        )


def never_generated(
    model: Model, special_tokens: str | bool, *, published: bool
) -> tuple[int, ...]:
    """The ids that a model scores but never generates; also sets how it reads special tokens.

    Of a model that is not `published` but ours, pipeline.json says which. Raises ConfigError for
    an unknown value, or where there are no special tokens. See `load`.
    """
    named = "all" if special_tokens is True else special_tokens
    wanted = named or "none"
    text, drawn = model.modality, wanted in ("drawn", "all")
    if wanted not in SPECIAL:
        raise ConfigError(f"special_tokens={wanted!r}; {nearest(wanted, SPECIAL)}")
    if not isinstance(text, HasSpecialTokens):
        if wanted != "none":
            raise ConfigError(f"special_tokens={wanted!r}: a model of {text.name} has none")
        return ()
    text.reads_special = wanted in ("typed", "all")
    if published or model.never_generated:
        return tuple(sorted(text.no_text(model.space.vocab_size, special=not drawn)))
    if drawn:
        raise ConfigError(f"special_tokens={wanted!r}: this model was trained without them")
    return ()
