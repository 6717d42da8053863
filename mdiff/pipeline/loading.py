"""From a name or a directory to the parts of a model, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mdiff.backbones.layers import Backbone
from mdiff.denoiser import Denoiser
from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError, nearest
from mdiff.files import (
    PIPELINE,
    ModelFiles,
    locate,
    staged,
    write_json,
)
from mdiff.find import find
from mdiff.modalities import HasFolders, Modality
from mdiff.pipeline.amused import amused, load_directory
from mdiff.pipeline.codec_beside import modality_beside
from mdiff.pipeline.placing import AUTO, DeviceMap, planned, spread
from mdiff.pipeline.published import built, filled, recognised, unsupported
from mdiff.pipeline.transformers_model import transformers_model
from mdiff.sampling import State
from mdiff.schedule import SCHEDULES, Linear, Schedule, named_schedule
from mdiff.tokens import TokenSpace

FORMAT = 1
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model",
    "spiece.model",
)  # fmt: skip
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16,
    "bfloat16": torch.bfloat16, "fp64": torch.float64, "fp32": torch.float32,
    "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of.

    `window` is the trained length, None if unknown; `sampler` what generates where none is named.
    """

    denoiser: Denoiser
    space: TokenSpace
    modality: Modality
    schedule: Schedule
    window: int | None
    sampler: str | Callable[..., Iterator[State]] = "first_hitting"


def load_parts(
    name: str,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | DeviceMap | str | None,
    mask_id: int | None,
    block_length: int | None,
    tokenizer: str | None = None,
) -> Parts:
    """The parts of "builtin:NAME", a directory or a Hub id; see `mdiff.load`."""
    kind = _dtype(dtype)
    asked: Any = AUTO if device == AUTO else None
    if isinstance(device, Mapping):
        asked = {part: _device(own) for part, own in device.items()}
    place = _device(None if asked is not None else device)
    files = locate(name)
    if tokenizer is not None and (files.pipeline is not None or files.classes):
        raise ConfigError(f"tokenizer={tokenizer!r}: {name} has its own way from text to ids")
    if files.pipeline is not None:
        parts = _own(files, files.pipeline, kind, mask_id, place if asked is None else asked)
    elif files.classes:
        parts = _several(files, kind, mask_id, place)
    else:
        parts = _foreign(files, kind, mask_id, place if asked is None else asked, tokenizer)
    if block_length is not None:
        if not hasattr(parts.denoiser, "block_length"):
            raise ConfigError(f"block_length={block_length}: {name} is not a block model")
        if block_length < 1:
            raise ConfigError(f"block_length={block_length}: need at least 1")
        parts.denoiser.block_length = block_length
    module: Any = parts.denoiser
    if getattr(module, "main_device", None) is None:
        module.to(place)
    module.eval()
    return parts


def _own(
    files: ModelFiles,
    described: Mapping[str, Any],
    dtype: torch.dtype | None,
    mask_id: int | None,
    place: torch.device | DeviceMap | str,
) -> Parts:
    """What `save_parts` or training wrote."""
    folder = files.folder
    try:
        if described["format"] != FORMAT:
            raise CheckpointError(f"{folder / PIPELINE}: expected format {FORMAT}")
        settings, noise = dict(described["modality"]), dict(described["schedule"])
        space = TokenSpace(**described["space"])
        schedule = named_schedule(noise.pop("name"), **noise)
        backbone, window = described["backbone"], described["length"]
        medium = settings.pop("name")
        _check_part(folder, backbone)
        if window is not None and (type(window) is not int or window < 1):
            raise CheckpointError(f"{folder / PIPELINE}: length={window!r}: expected a number")
        if mask_id is not None:
            space = replace(space, mask_id=mask_id)
            settings["mask_id"] = mask_id
        modality = _modality(folder, medium, settings)
    except (CheckpointError, DataError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / PIPELINE} is not valid: {error}") from error
    if _written(modality.space) != _written(space):
        raise DataError(
            f"{folder}: the modality has {modality.space.vocab_size} ids, the model "
            f"{space.vocab_size}: they are not of the same training"
        )
    find("backbones", backbone)
    room = recognised(files)
    denoiser: Denoiser
    if room is not None:
        denoiser = _published(files, room, dtype, place)
    else:
        denoiser = transformers_model(files, dtype, mask_id=space.mask_id)
    _check_columns(denoiser, space, folder)
    return Parts(denoiser, space, modality, schedule, window)


def _written(space: TokenSpace) -> int:
    """How many ids there are beside the mask, which some heads have a column for."""
    return space.vocab_size - (space.mask_id < space.vocab_size)


def load_modality(files: ModelFiles) -> Modality:
    """The modality of a model that `save_parts` or training wrote, without its weights."""
    folder = files.folder
    if files.pipeline is None:
        raise CheckpointError(f"{folder / PIPELINE} is missing")
    try:
        settings = dict(files.pipeline["modality"])
        return _modality(folder, settings.pop("name"), settings)
    except (CheckpointError, DataError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / PIPELINE} is not valid: {error}") from error


def _modality(folder: Path, name: str, settings: dict[str, Any]) -> Modality:
    _check_part(folder, name)
    made: Modality = find("modalities", name)(**settings, folder=folder)
    return made


def _check_part(folder: Path, name: Any) -> None:
    """A name from a file may choose among the parts here; it may not import anything."""
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise CheckpointError(f"{folder / PIPELINE}: {name!r} is not a part of mdiff")


def _foreign(
    files: ModelFiles,
    dtype: torch.dtype | None,
    mask_id: int | None,
    place: torch.device | DeviceMap | str,
    tokenizer: str | None,
) -> Parts:
    """A model of another project or a Hugging Face masked language model, with its tokenizer or
    without one.
    """
    described, folder = files.config, files.folder
    room = recognised(files)
    strange = unsupported(files) if room is None else None
    if strange is not None:
        raise strange
    module: Any = None
    if room is not None:
        module = _published(files, room, dtype, place)
        mask_id = module.mask_id if mask_id is None else mask_id
    text = _text_of(folder, mask_id, tokenizer)
    if mask_id is None:
        mask_id = described.get("mask_id") if text is None else text.tokenizer.mask_id
    if type(mask_id) is not int:
        raise ConfigError(f"{folder} does not say which id is the mask: give mask_id=")
    denoiser = module or transformers_model(files, dtype, mask_id=mask_id)
    space = TokenSpace(_columns(denoiser), mask_id=mask_id)
    if text is not None and text.tokenizer.size > max(space.vocab_size, mask_id + 1):
        raise DataError(
            f"{folder}: the tokenizer has {text.tokenizer.size} ids, the model {space.vocab_size}"
        )
    modality = text or modality_beside(folder, module)
    modality = modality or find("modalities", "ids")(vocab_size=space.vocab_size, mask_id=mask_id)
    own = getattr(denoiser, "window", None) or getattr(denoiser, "max_length", None)
    window = own or described.get("max_position_embeddings", described.get("max_length"))
    return Parts(denoiser, space, modality, Linear(), window if type(window) is int else None)


def _published(
    files: ModelFiles, room: str, dtype: torch.dtype | None, place: torch.device | DeviceMap | str
) -> Backbone:
    """Another project's model on its device or devices; ConfigError for one that is refused."""
    module = built(room, files.config)
    if module.refused is not None:
        raise ConfigError(f"{files.folder} cannot be used: {module.refused}")
    if isinstance(place, torch.device):
        return filled(module, files, dtype=dtype, device=place)
    plan = planned(module, files, dtype=dtype) if isinstance(place, str) else place
    return spread(module, files, plan, dtype=dtype)


def _several(
    files: ModelFiles, dtype: torch.dtype | None, mask_id: int | None, place: torch.device
) -> Parts:
    """The model of a directory with a folder for each of its parts."""
    made = load_directory(files, dtype=dtype, device=place)
    if mask_id not in (None, made.space.mask_id):
        raise ConfigError(f"mask_id={mask_id}: this model's is {made.space.mask_id}")
    return Parts(
        made.denoiser, made.space, made.modality, Linear(), made.denoiser.window, sampler=amused
    )


def _text_of(folder: Path, mask_id: int | None, tokenizer: str | None) -> Any:
    """The modality of a tokenizer, or else of the folder's; None without one."""
    if tokenizer is not None:
        return find("modalities", "text")(tokenizer=tokenizer, mask_id=mask_id)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    return find("modalities", "text")(tokenizer=str(folder), mask_id=mask_id, folder=folder)


def _columns(denoiser: Any) -> int:
    if isinstance(denoiser, Backbone):
        return denoiser.vocab_size
    config = getattr(denoiser, "config", None) or denoiser.model.config
    return int(config.vocab_size)


def _check_columns(denoiser: Any, space: TokenSpace, folder: Path) -> None:
    columns = _columns(denoiser)
    if columns != space.vocab_size:
        raise DataError(
            f"{folder}: the model has {columns} ids, {PIPELINE} says {space.vocab_size}"
        )


def save_parts(folder: Path, parts: Parts) -> None:
    """Write the parts, complete or not at all, so that `load_parts` reads them.

    Raises CheckpointError where the folder exists, ConfigError for a denoiser or a schedule
    that has no files.
    """
    model: Any = parts.denoiser
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"{type(parts.denoiser).__name__} cannot be saved: it has no files")
    medium = parts.modality
    if isinstance(medium, HasFolders):
        # A published directory: each part in the folder and the layout that it came in.
        with staged(folder) as inner:
            model.save_pretrained(inner / medium.denoiser_folder)
            medium.save(inner)
        return
    # A part lives in the module of its name.
    backbone = type(model).__module__.rpartition(".")[2]
    name = type(parts.schedule).__name__.lower()
    if name not in SCHEDULES:
        raise ConfigError(f"the schedule {name} cannot be saved; known: {', '.join(SCHEDULES)}")
    described = {
        "format": FORMAT,
        "backbone": backbone,
        "length": parts.window,
        "modality": parts.modality.config(),
        "space": asdict(parts.space),
        "schedule": {"name": name} | asdict(parts.schedule),  # type: ignore[call-overload]
    }
    from transformers import logging

    logging.disable_progress_bar()
    with staged(folder) as inner:
        model.save_pretrained(inner)
        parts.modality.save(inner)
        write_json(inner / PIPELINE, described)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype.removeprefix("torch.") not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    return DTYPES[dtype.removeprefix("torch.")]


def _device(device: Any) -> torch.device:
    """The device; by default the first GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        known = "known: auto, cpu, cuda, cuda:0, mps"
        raise ConfigError(f"unknown device {str(device)!r}; {known}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device}: this torch sees no CUDA device; use cpu")
    return place
