"""From a model's name to its checked files: a builtin, a directory or a repository of the Hub."""

import re
from importlib.resources import files
from pathlib import Path

from mdiff.errors import BackendError, CheckpointError, ConfigError, nearest
from mdiff.files.atomic import MANIFEST, STEP_NAME, digest, latest, read_manifest, verify
from mdiff.files.config_fields import CONFIG
from mdiff.files.model_files import MODEL_INDEX, PIPELINE, ModelFiles, read_model_files

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
# What a snapshot of the Hub is made of; pickles and code are never fetched.
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")
# The same weights once more, in half precision.
UNWANTED = ("*.fp16.safetensors",)


def locate(name: str) -> ModelFiles:
    """The checked files of a model: builtin, in a directory or on the Hub; no tensor is read.

    A directory is verified against its manifest if it has one; of a run's directory it is the
    latest complete checkpoint.

    A Hub id may name a commit, a tag or a branch: "org/name@revision".

    Raises ConfigError for an unknown builtin model, CheckpointError for a path without a
    model or an altered one, BackendError where the Hub cannot be reached.
    """
    known = builtin_models()
    if name.startswith(BUILTIN):
        own = name.removeprefix(BUILTIN)
        if own not in known:
            raise ConfigError(f"no builtin model {own!r}; {nearest(own, known)}")
        return _verified(known[own])
    path = at_home(name)
    if path.is_dir():
        return _verified(_step(path))
    if path.exists():
        raise CheckpointError(f"{path} is a file: expected the directory that holds the model")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{path}: no such directory; expected a model, or builtin:NAME")
    if name in known:
        raise ConfigError(f"{name} is no directory here; did you mean {BUILTIN}{name}?")
    if path.parent.is_dir() and path.parent != Path():
        beside = nearest(path.name, [entry.name for entry in path.parent.iterdir()][:1000])
        raise CheckpointError(f"{path}: no such directory in {path.parent}; {beside}")
    return _from_hub(name)


def at_home(name: str) -> Path:
    """The path, with the home directory for a ~; CheckpointError where there can be none."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError:
        raise CheckpointError(f"{name}: no such home directory") from None
    except OSError as error:
        raise CheckpointError(f"{name[:80]}: no such model: {error.strerror}") from None
    return path


def builtin_models() -> dict[str, Path]:
    """The models that this installation holds, by name."""
    folder = Path(str(files("mdiff.builtin")))
    return {entry.name: entry for entry in folder.iterdir() if (entry / PIPELINE).exists()}


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


def _verified(folder: Path) -> ModelFiles:
    """The files of a folder, verified against its manifest where it has or needs one."""
    checked = (folder / MANIFEST).exists() or (folder / PIPELINE).exists()
    return read_model_files(folder, manifest=verify(folder) if checked else None)


def _from_hub(name: str) -> ModelFiles:
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


def snapshot(folder: Path) -> ModelFiles:
    """The checked files of a snapshot of the Hub, which are links into the cache around it."""
    root = folder.parent.parent
    manifest = None
    if (folder / PIPELINE).exists():
        manifest = read_manifest(folder, root=root)
        for name, entry in manifest.files.items():
            if digest(folder / name) != entry:
                raise CheckpointError(f"{folder / name} is not the file that the manifest lists")
    return read_model_files(folder, root=root, manifest=manifest)
