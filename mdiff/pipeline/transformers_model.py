"""A masked language model in the layout of transformers: one of our own or of any other."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mdiff.denoiser import Denoiser
from mdiff.errors import CheckpointError, MdiffError
from mdiff.files import CONFIG, TRANSFORMERS, ModelFiles
from mdiff.find import find, names

# What the model_type of our own architectures begins with.
OURS = "mdiff-"
# Settings that say how many layers there are, and the name of a tensor in one of several layers.
LAYERS = re.compile(r"(^|_)n?_?(layers?|depth|blocks?)$")
IN_A_LAYER = re.compile(r"\.\d+\.")
# A model has up to twice the weights of its files, where tied ones are saved once.
MOST_OVER_FILES, SPARE = 4, 2**20


def transformers_model(files: ModelFiles, dtype: torch.dtype | None, *, mask_id: int) -> Denoiser:
    """The model with its weights; every one of its tensors is in the files.

    Raises CheckpointError where transformers cannot load it, or its files lack something.
    """
    _check_settings(files.folder, files.config, tensors=len(files.entries))
    with TRANSFORMERS:
        return _read(files, dtype, mask_id)


def _read(files: ModelFiles, dtype: torch.dtype | None, mask_id: int) -> Denoiser:
    from transformers import AutoConfig, AutoModelForMaskedLM, logging

    # Importing an architecture of ours makes it known to transformers. Its model_type is the
    # name of its file; any other name in a file imports nothing.
    folder = files.folder
    kind = str(files.config.get("model_type"))
    if kind.startswith(OURS) and kind.removeprefix(OURS).replace("-", "_") in names("backbones"):
        find("backbones", kind.removeprefix(OURS))
    logging.disable_progress_bar()
    options = {"trust_remote_code": False, "local_files_only": True}
    try:
        described = AutoConfig.from_pretrained(str(folder), **options)
        with torch.device("meta"):
            skeleton = AutoModelForMaskedLM.from_config(described)
        held = sum(math.prod(entry["shape"]) for entry in files.entries.values())
        _check_size(folder, skeleton, held=held)
        model, report = AutoModelForMaskedLM.from_pretrained(
            str(folder), dtype=dtype or "auto", use_safetensors=True, output_loading_info=True,
            **options,
        )  # fmt: skip
    except (MdiffError, MemoryError):
        raise
    # Whatever the library raises on a file: it is not one that it can load.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{folder} cannot be loaded: {first}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if report[problem]:
            absent = sorted(map(str, report[problem]))
            raise CheckpointError(f"{folder}: {problem.replace('_', ' ')}: {', '.join(absent[:4])}")
    left_out = sorted(name for name in report["unexpected_keys"] if IN_A_LAYER.search(name))
    if left_out:
        raise CheckpointError(
            f"{folder / CONFIG} leaves out layers that the files hold: {', '.join(left_out[:4])}"
        )
    if isinstance(model, Denoiser):
        return model
    wrapped: Denoiser = find("backbones", "masked_lm")(model, mask_id=mask_id)
    return wrapped


def _check_settings(folder: Path, settings: Mapping[str, Any], *, tensors: int) -> None:
    """Raise CheckpointError for settings that cost far more to read than the files are worth.

    Each layer has a tensor of its own at least; and code of the Hub is not run here.
    """
    for name, value in settings.items():
        if LAYERS.search(name) and type(value) is int and not 0 <= value <= tensors:
            raise CheckpointError(
                f"{folder / CONFIG}: {name}={value}: the files hold {tensors} tensors"
            )
        if name.endswith("_implementation") and "/" in str(value):
            raise CheckpointError(
                f"{folder / CONFIG}: {name}={value!r} is code of the Hub: refused"
            )


def _check_size(folder: Path, skeleton: Any, *, held: int) -> None:
    """Raise CheckpointError where the settings describe far more weights than the files hold.

    transformers makes all of them before it finds that they are of other shapes.
    """
    described = sum(parameter.numel() for parameter in skeleton.parameters())
    if described > MOST_OVER_FILES * held + SPARE:
        raise CheckpointError(
            f"{folder / CONFIG} describes {described:,} weights, the files hold {held:,}"
        )
