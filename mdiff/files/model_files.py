"""The small files of a model, each read and checked once and handed on: settings and headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdiff.errors import CheckpointError, nearest
from mdiff.files.atomic import Manifest
from mdiff.files.config_fields import CONFIG
from mdiff.files.generation_config import GENERATION_CONFIG, GenerationConfig
from mdiff.files.settings import parse_settings
from mdiff.files.untrusted import (
    Header,
    TensorEntry,
    check_tensors,
    inside,
    read_json,
    refuse_special,
)

PIPELINE = "pipeline.json"
# What the weights in a folder are called, by transformers and by diffusers; with an index where
# they are in shards.
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX_SUFFIX = ".index.json"
# A directory of several models, each in a folder of its own.
MODEL_INDEX = "model_index.json"
DIRECTORIES = ("AmusedPipeline",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelFiles:
    """The contents of the small files in `folder`, checked; no tensor has been read.

    `config` is config.json, `generation` what generation_config.json states, `headers` those of
    the safetensors files with weights, `manifest` and `pipeline` the files of these names, None
    where there are none. A directory of several
    models has no config of its own: `classes` are the classes in its folders, `parts` the files
    of those folders that hold a config.json, and `headers` those of all parts.
    """

    folder: Path
    config: Mapping[str, Any]
    headers: Mapping[Path, Header]
    manifest: Manifest | None = None
    pipeline: Mapping[str, Any] | None = None
    classes: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, ModelFiles] = field(default_factory=dict)
    generation: GenerationConfig = GenerationConfig()  # noqa: RUF009

    @property
    def entries(self) -> dict[str, TensorEntry]:
        """The header entry of each tensor by its name."""
        return {name: entry for header in self.headers.values() for name, entry in header.items()}


def read_model_files(
    folder: Path, *, root: Path | None = None, manifest: Manifest | None = None
) -> ModelFiles:
    """The `ModelFiles` of a folder; its contents are compared with no manifest here.

    Links may lead anywhere in `root`, by default the folder or, of a snapshot of the Hub, whose
    files are links, the cache around it. Raises CheckpointError for files that are missing,
    truncated, altered or not regular, for a pickle, and for names and links that lead out of
    `root`.
    """
    refuse_special(folder)
    root = _root(folder) if root is None else root
    pipeline = read_json(folder / PIPELINE) if (folder / PIPELINE).exists() else None
    if (folder / MODEL_INDEX).exists():
        classes = _classes(folder)
        parts = {
            name: read_model_files(folder / name, root=root)
            for name in classes
            if (folder / name / CONFIG).exists()
        }
        headers = {path: h for part in parts.values() for path, h in part.headers.items()}
        return ModelFiles(folder, {}, headers, manifest, pipeline, classes, parts)
    headers = read_headers(_weights(folder, root))
    config, stated = read_json(folder / CONFIG), folder / GENERATION_CONFIG
    if not stated.exists():
        return ModelFiles(folder, config, headers, manifest, pipeline)
    generation = parse_settings(
        GenerationConfig, read_json(stated), origin=str(stated), error=CheckpointError
    )
    return ModelFiles(folder, config, headers, manifest, pipeline, generation=generation)


def read_headers(paths: list[Path]) -> dict[Path, Header]:
    """The checked headers of safetensors files; CheckpointError for a name in two of them."""
    headers = {path: check_tensors(path) for path in paths}
    known: set[str] = set()
    for path, header in headers.items():
        for name in header:
            if name in known:
                raise CheckpointError(f"{path}: {name[:80]!r} is in another file too")
            known.add(name)
    return headers


def _root(folder: Path) -> Path:
    """The folder, or the cache of the Hub whose snapshot it is."""
    cache = folder.parent.parent
    return cache if folder.parent.name == "snapshots" and (cache / "blobs").is_dir() else folder


def _weights(folder: Path, root: Path) -> list[Path]:
    """The safetensors files of a model; CheckpointError where there are none."""
    for index in (name + INDEX_SUFFIX for name in WEIGHTS):
        if (folder / index).exists():
            files = read_json(inside(folder, index, root=root)).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(n, str) for n in files.values()):
                raise CheckpointError(f"{folder / index}: expected a weight_map of file names")
            return [inside(folder, name, root=root) for name in sorted(set(files.values()))]
    for name in WEIGHTS:
        if (folder / name).exists():
            return [inside(folder, name, root=root)]
    for pickle in (path for pattern in PICKLES for path in folder.glob(pattern)):
        check_tensors(pickle)
    raise CheckpointError(f"{folder} holds no {' or '.join(WEIGHTS)}")


def _classes(folder: Path) -> dict[str, str]:
    """The folders that a directory's index names, with the class of what is in each.

    Raises CheckpointError for an index that is not valid, or of a kind that is not supported.
    """
    index = read_json(folder / MODEL_INDEX)
    kind = str(index.get("_class_name"))
    if kind not in DIRECTORIES:
        raise CheckpointError(
            f"{folder} is a {kind[:80]}, which is not supported; {nearest(kind, DIRECTORIES)}"
        )
    found = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or not isinstance(entry[1], str | None):
            raise CheckpointError(f"{folder / MODEL_INDEX}: {name[:80]!r}: expected [from, class]")
        inside(folder, name)
        if entry[1] is not None:
            found[name] = entry[1]
    return found
