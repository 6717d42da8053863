"""From a name or a directory to the parts of a model, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from mdiff.checkpoint import MANIFEST, STEP_NAME, latest, staged, verify, write_json
from mdiff.denoiser import Denoiser
from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError, nearest
from mdiff.files import check_tensors, inside, read_json
from mdiff.find import find
from mdiff.schedule import SCHEDULES, Linear, Schedule, named_schedule
from mdiff.tokens import TokenSpace

BUILTIN = "builtin:"
PIPELINE = "pipeline.json"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
FORMAT = 1
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What a snapshot of the Hub is made of; pickles and code are never fetched.
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
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
    """What a pipeline is made of; `window` is the trained length, None if unknown."""

    denoiser: Denoiser
    space: TokenSpace
    modality: Any
    schedule: Schedule
    window: int | None


def load_parts(
    name: str,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    mask_id: int | None,
    block_length: int | None,
) -> Parts:
    """The parts of "builtin:NAME", a directory or a Hub id; see `mdiff.load`."""
    kind = _dtype(dtype)
    place = _device(device)
    folder = locate(name)
    ours = (folder / PIPELINE).exists()
    parts = _own(folder, kind, mask_id) if ours else _foreign(folder, kind, mask_id)
    if block_length is not None:
        if not hasattr(parts.denoiser, "block_length"):
            raise ConfigError(f"block_length={block_length}: {name} is not a block model")
        parts.denoiser.block_length = block_length
    module: Any = parts.denoiser
    module.to(place).eval()
    return parts


def locate(name: str) -> Path:
    """The directory of a model, verified against its manifest if it has one.

    Raises ConfigError for an unknown builtin model, CheckpointError for a path without a
    model or an altered one, BackendError where the Hub cannot be reached.
    """
    if name.startswith(BUILTIN):
        return _verified(_builtin(name.removeprefix(BUILTIN)))
    path = Path(name).expanduser()
    if path.is_dir():
        return _verified(_step(path))
    if path.exists():
        raise CheckpointError(f"{path} is a file: expected the directory that holds the model")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{path}: no such directory; expected a model, or builtin:NAME")
    return _from_hub(name)


def _builtin(name: str) -> Path:
    room = Path(str(files("mdiff.builtin")))
    known = [entry.name for entry in room.iterdir() if (entry / PIPELINE).exists()]
    if name not in known:
        raise ConfigError(f"no builtin model {name!r}; {nearest(name, known)}")
    return room / name


def _step(path: Path) -> Path:
    """The directory itself where it holds a model, else a run's latest complete checkpoint."""
    if (path / PIPELINE).exists() or (path / CONFIG).exists():
        return path
    found = latest(path)
    if found is not None:
        return found
    if any(STEP_NAME.fullmatch(entry.name) for entry in path.iterdir()):
        raise CheckpointError(f"{path} holds no complete checkpoint")
    raise CheckpointError(f"{path} holds no model: expected {PIPELINE} or {CONFIG}")


def _verified(folder: Path) -> Path:
    """The folder after its files were checked: by the manifest, and each tensor file's header."""
    if (folder / MANIFEST).exists() or (folder / PIPELINE).exists():
        verify(folder)
    check_weights(folder)
    return folder


def check_weights(folder: Path, *, root: Path | None = None) -> list[Path]:
    """The safetensors files of a model, headers checked; no tensor is read.

    Raises CheckpointError where there is none (a pickle is named), where one is truncated or
    altered, or where the index leads out of the directory (or of `root`).
    """
    if (folder / INDEX).exists():
        index = read_json(inside(folder, INDEX, root=root)).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise CheckpointError(f"{folder / INDEX}: expected a weight_map of file names")
        names = sorted(set(index.values()))
    else:
        names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not names:
        pickles = [path for ending in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{ending}")]
        if pickles:
            check_tensors(pickles[0])
        raise CheckpointError(f"{folder} holds no .safetensors file")
    paths = [inside(folder, name, root=root) for name in names]
    for path in paths:
        check_tensors(path)
    return paths


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name} is neither a directory here nor a model on the Hub") from None
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise BackendError(
            f"{name} is no directory here, and the Hub cannot be reached: {first}"
        ) from error
    return snapshot(folder)


def snapshot(folder: Path) -> Path:
    """A snapshot of the Hub, checked: its files are links into the cache that holds it."""
    root = folder.parent.parent
    check_weights(folder, root=root)
    if (folder / PIPELINE).exists():
        for name, entry in read_json(folder / MANIFEST).get("files", {}).items():
            content = inside(folder, name, root=root).read_bytes()
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise CheckpointError(f"{folder / name} is not the file that the manifest lists")
    return folder


def _own(folder: Path, dtype: torch.dtype | None, mask_id: int | None) -> Parts:
    """What `save_parts` or training wrote."""
    described = read_json(folder / PIPELINE)
    try:
        if described["format"] != FORMAT:
            raise CheckpointError(f"{folder / PIPELINE}: format {described['format']} is not {FORMAT}")
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
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / PIPELINE} is not valid: {error}") from error
    if modality.space.vocab_size != space.vocab_size:
        raise DataError(
            f"{folder}: the modality has {modality.space.vocab_size} ids, the model "
            f"{space.vocab_size}: they are not of the same training"
        )
    find("backbones", backbone)
    denoiser = _denoiser(folder, dtype, mask_id=space.mask_id)
    _check_columns(denoiser, space, folder)
    return Parts(denoiser, space, modality, schedule, window)


def load_modality(folder: Path) -> Any:
    """The modality of a model that `save_parts` or training wrote, without its weights."""
    settings = dict(read_json(folder / PIPELINE).get("modality") or {})
    try:
        return _modality(folder, settings.pop("name"), settings)
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / PIPELINE} is not valid: {error}") from error


def _modality(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    _check_part(folder, name)
    return find("modalities", name)(**settings, folder=folder)


def _check_part(folder: Path, name: Any) -> None:
    """A name from a file may choose among the parts here; it may not import anything."""
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise CheckpointError(f"{folder / PIPELINE}: {name!r} is not a part of mdiff")


def _foreign(folder: Path, dtype: torch.dtype | None, mask_id: int | None) -> Parts:
    """A Hugging Face masked language model, with its tokenizer or without one."""
    described = read_json(folder / CONFIG)
    has_tokenizer = any((folder / name).exists() for name in TOKENIZER_FILES)
    text: Any = None
    if has_tokenizer:
        text = find("modalities", "text")(tokenizer=str(folder), mask_id=mask_id, folder=folder)
        if mask_id is None:
            mask_id = text.tokenizer.mask_id
    if mask_id is None:
        mask_id = described.get("mask_id")
    if type(mask_id) is not int:
        raise ConfigError(f"{folder} does not say which id is the mask: give mask_id=")
    denoiser = _denoiser(folder, dtype, mask_id=mask_id)
    space = TokenSpace(_columns(denoiser), mask_id=mask_id)
    if text is not None and text.tokenizer.size > max(space.vocab_size, mask_id + 1):
        raise DataError(
            f"{folder}: the tokenizer has {text.tokenizer.size} ids, the model {space.vocab_size}"
        )
    modality = text or find("modalities", "ids")(vocab_size=space.vocab_size, mask_id=mask_id)
    window = described.get("max_position_embeddings", described.get("max_length"))
    return Parts(denoiser, space, modality, Linear(), window if type(window) is int else None)


def _denoiser(folder: Path, dtype: torch.dtype | None, *, mask_id: int) -> Denoiser:
    """The model with its weights; every one of its tensors is in the files."""
    from transformers import AutoModelForMaskedLM, logging

    # Importing our own architecture makes it known to transformers.
    find("backbones", "transformer")
    logging.disable_progress_bar()
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            str(folder), dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{folder} cannot be loaded: {first}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(map(str, report[problem]))
            raise CheckpointError(f"{folder}: {problem.replace('_', ' ')}: {', '.join(names[:4])}")
    return model if isinstance(model, Denoiser) else find("backbones", "masked_lm")(model)


def _columns(denoiser: Any) -> int:
    config = getattr(denoiser, "config", None) or denoiser.model.config
    return int(config.vocab_size)


def _check_columns(denoiser: Any, space: TokenSpace, folder: Path) -> None:
    columns = _columns(denoiser)
    if columns != space.vocab_size:
        raise DataError(f"{folder}: the model has {columns} ids, {PIPELINE} says {space.vocab_size}")


def save_parts(folder: Path, parts: Parts) -> None:
    """Write the parts, complete or not at all, so that `load_parts` reads them.

    Raises CheckpointError where the folder exists, ConfigError for a denoiser or a schedule
    that has no files.
    """
    model: Any = getattr(parts.denoiser, "model", parts.denoiser)
    if not hasattr(model, "save_pretrained"):
        raise ConfigError(f"{type(parts.denoiser).__name__} cannot be saved: it has no files")
    backbone = "transformer" if model is parts.denoiser else "masked_lm"
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


def _device(device: torch.device | str | None) -> torch.device:
    """The device; by default the first GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {str(device)!r}; known: cpu, cuda, cuda:0, mps") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(f"device {device}: this torch sees no CUDA device; use cpu")
    return place
