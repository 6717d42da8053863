"""From a name to the directory of a model: builtin, here or on the Hub; checked, not loaded."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from pathlib import Path

from mdiff.errors import BackendError, CheckpointError, ConfigError, nearest
from mdiff.files.atomic import MANIFEST, STEP_NAME, latest, verify
from mdiff.files.untrusted import check_tensors, inside, read_json

BUILTIN = "builtin:"
PIPELINE = "pipeline.json"
CONFIG = "config.json"
# What the weights in a folder are called, by transformers and by diffusers; with an index where
# they are in shards.
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX_SUFFIX = ".index.json"
# A directory of several models, each in a folder of its own.
MODEL_INDEX = "model_index.json"
DIRECTORIES = ("AmusedPipeline",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
# What a snapshot of the Hub is made of; pickles and code are never fetched.
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
# The same weights once more, in half precision.
UNWANTED = ("*.fp16.safetensors",)


def locate(name: str) -> Path:
    """The directory of a model, verified against its manifest if it has one.

    A Hub id may name a commit, a tag or a branch: "org/name@revision".

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
    if name in _builtins():
        raise ConfigError(f"{name} is no directory here; did you mean {BUILTIN}{name}?")
    if path.parent.is_dir() and path.parent != Path():
        beside = nearest(path.name, [entry.name for entry in path.parent.iterdir()][:1000])
        raise CheckpointError(f"{path}: no such directory in {path.parent}; {beside}")
    return _from_hub(name)


def _builtin(name: str) -> Path:
    known = _builtins()
    if name not in known:
        raise ConfigError(f"no builtin model {name!r}; {nearest(name, known)}")
    return known[name]


def _builtins() -> dict[str, Path]:
    room = Path(str(files("mdiff.builtin")))
    return {entry.name: entry for entry in room.iterdir() if (entry / PIPELINE).exists()}


def _step(path: Path) -> Path:
    """The directory itself where it holds a model, else a run's latest complete checkpoint."""
    if any((path / name).exists() for name in (PIPELINE, CONFIG, MODEL_INDEX)):
        return path
    found = latest(path)
    if found is not None:
        return found
    if any(STEP_NAME.fullmatch(entry.name) for entry in path.iterdir()):
        raise CheckpointError(f"{path} holds no complete checkpoint")
    raise CheckpointError(f"{path} holds no model: expected {PIPELINE}, {CONFIG} or {MODEL_INDEX}")


def _verified(folder: Path) -> Path:
    """The folder after its files were checked: by the manifest, and each tensor file's header."""
    if (folder / MANIFEST).exists() or (folder / PIPELINE).exists():
        verify(folder)
    check_weights(folder)
    return folder


def check_weights(folder: Path, *, root: Path | None = None) -> list[Path]:
    """The safetensors files of a model, headers checked; no tensor is read.

    `root` is by default the folder or, of a snapshot of the Hub, whose files are links, the
    cache that it lies in. Raises CheckpointError where there is none (a pickle is named), where
    one is truncated or altered, or where the index leads out of `root`.
    """
    root = _root(folder) if root is None else root
    if (folder / MODEL_INDEX).exists():
        return [
            path
            for part in model_parts(folder)
            if (folder / part / CONFIG).exists()
            for path in check_weights(folder / part, root=root)
        ]
    names = _weight_files(folder, root)
    if not names:
        for pickle in (path for pattern in PICKLES for path in folder.glob(pattern)):
            check_tensors(pickle)
        raise CheckpointError(f"{folder} holds no {' or '.join(WEIGHTS)}")
    paths = [inside(folder, name, root=root) for name in names]
    for path in paths:
        check_tensors(path)
    return paths


def _root(folder: Path) -> Path:
    """The folder, or the cache of the Hub whose snapshot it is."""
    cache = folder.parent.parent
    return cache if folder.parent.name == "snapshots" and (cache / "blobs").is_dir() else folder


def _weight_files(folder: Path, root: Path | None) -> list[str]:
    """The names of the files with a model's weights; none where there are none."""
    for name in WEIGHTS:
        index = name + INDEX_SUFFIX
        if (folder / index).exists():
            files = read_json(inside(folder, index, root=root)).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(n, str) for n in files.values()):
                raise CheckpointError(f"{folder / index}: expected a weight_map of file names")
            return sorted(set(files.values()))
    return [name for name in WEIGHTS if (folder / name).exists()][:1]


def model_parts(folder: Path) -> dict[str, str]:
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


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            )
        )  # fmt: skip
    except RevisionNotFoundError:
        raise CheckpointError(f"{repository} on the Hub has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name} is no directory here and no model on the Hub") from None
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
