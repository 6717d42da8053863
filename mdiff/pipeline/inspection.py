"""The report on a model's files, from its config and headers alone: no weight is read."""

import math
from collections import Counter
from pathlib import Path
from typing import TypedDict

from mdiff.backbones.layers import Backbone
from mdiff.denoiser import block_length_of
from mdiff.errors import CheckpointError
from mdiff.files import (
    CONFIG,
    MODEL_INDEX,
    PIPELINE,
    ModelFiles,
    TensorEntry,
    check_tensors,
    inside,
    problems,
)
from mdiff.pipeline.loading import CODEC_FOLDER
from mdiff.pipeline.published import built, recognised, unsupported

# Of what noise the hidden positions are known.
MASKED = {"mask": "hidden "}


class TensorReport(TypedDict):
    """A tensor of a file: `used` is "loaded", "renamed", "unknown" or what is wrong with it."""

    name: str
    shape: list[int]
    dtype: str
    used: str
    bytes: int


def is_foreign(files: ModelFiles) -> bool:
    """Whether they are of one model of another project that is no masked LM of transformers.

    With a codec beside it, it is inspected as a model of pictures.
    """
    if files.pipeline is not None or files.classes or (files.folder / CODEC_FOLDER).exists():
        return False
    return recognised(files) is not None or unsupported(files) is not None


def report(files: ModelFiles) -> tuple[dict[str, object], CheckpointError | None]:
    """The report on a foreign model, and why it cannot be loaded, if it cannot.

    `used` of a tensor is "loaded" or what is wrong with it, such as "unexpected"; of a model
    that is not supported "unknown". `missing` are tensors that the files lack. Raises
    CheckpointError for files or a config that cannot be read.
    """
    config, folder = files.config, files.folder
    family = recognised(files)
    named = [str(name)[:80] for name in config.get("architectures") or []]
    found: dict[str, object] = {
        "path": str(folder),
        "architecture": ", ".join(named) or str(config.get("model_type", "not named"))[:80],
        "family": family,
        "supported": family is not None,
        "sizes": {k: v for k, v in config.items() if type(v) is int},
    }
    used: dict[str, str] = {}
    fault: CheckpointError | None = None
    if family is None:
        fault = unsupported(files)
    else:
        module = built(family, config)
        wrong = problems(module, files.headers, module.tied)
        used = {line.split(" ")[0]: kind for kind, lines in wrong.items() for line in lines}
        found |= {
            "parameters": sum(math.prod(each.shape) for each in module.parameters()),
            "space": {"vocab_size": module.vocab_size, "mask_id": module.mask_id, "never": []},
            "window": module.window,
            "shifted": module.shifted,
            "shift": shift_of(module),
            "noise": module.noise,
            "predicts": described_prediction(module.noise, module.predicts),
            "uses_time": module.uses_time,
            "block_length": block_length_of(module),
            "refused": module.refused,
            "missing": wrong["missing"],
        }
        if any(wrong.values()):
            counts = "; ".join(f"{kind}: {len(some)}" for kind, some in wrong.items() if some)
            fault = CheckpointError(f"{folder} does not load: tensors {counts}")
    tensors = [
        described_tensor(name, entry, used.get(name, "unknown" if family is None else "loaded"))
        for header in files.headers.values()
        for name, entry in sorted(header.items())
    ]
    return found | summed(tensors), fault


def described_prediction(noise: str, predicts: object) -> str:
    """What logits are of, by the noise and by what the model says."""
    where = f"the clean token of each {MASKED.get(noise, '')}position"
    return where + (" given all others" if predicts == "leave_one_out" else "")


def shift_of(module: Backbone) -> str:
    """Which raw output predicts a position: "none" its own, "token" the one before it.

    "block seed" where a block's first token comes from the block before and is written first.
    """
    return "block seed" if module.block_seed else "token" if module.shifted else "none"


def loose(folder: Path) -> tuple[dict[str, object], CheckpointError] | None:
    """The tensors of a folder that holds safetensors files and no config; None for another."""
    paths = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not paths or any((folder / name).exists() for name in (PIPELINE, CONFIG, MODEL_INDEX)):
        return None
    tensors = [
        described_tensor(name, entry, "unknown")
        for path in paths
        for name, entry in sorted(check_tensors(inside(folder, path.name)).items())
    ]
    found: dict[str, object] = {
        "path": str(folder),
        "architecture": f"unknown: there is no {CONFIG}",
        "supported": False,
    }
    return found | summed(tensors), CheckpointError(
        f"{folder} has weights and no {CONFIG}: a model of unknown kind is not supported"
    )


def summed(tensors: list[TensorReport]) -> dict[str, object]:
    """The tensors, their bytes, how many of each type, and the names of those not accounted for."""
    unused = sorted(t["name"] for t in tensors if t["used"] not in ("loaded", "renamed"))
    return {
        "tensors": tensors,
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "types": dict(Counter(tensor["dtype"] for tensor in tensors)),
        "not_used": unused,
    }


def described_tensor(name: str, entry: TensorEntry, used: str) -> TensorReport:
    """The report on a tensor of a file's header."""
    begin, end = entry["data_offsets"]
    return TensorReport(
        name=name, shape=entry["shape"], dtype=entry["dtype"], used=used, bytes=end - begin
    )
