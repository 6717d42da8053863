"""Atomic writes of files and checkpoints, their manifests, and the lock of a directory.

A checkpoint is a directory with `manifest.json`, which holds the size and the SHA-256 of every
other file in it. It is written under a temporary name in the same parent directory, flushed to
the disk and then renamed: a directory of the final name is complete, whenever its writer was
killed.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from mdiff.errors import CheckpointError, ConfigError, warn
from mdiff.files.settings import STRICT, parse_settings
from mdiff.files.untrusted import inside, is_read, read_json, visible

MANIFEST = "manifest.json"
# How an error of safetensors names the operating system's.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
STEP_NAME = re.compile(r"step-(\d{6,})")


class FileEntry(BaseModel):
    """What a manifest holds of a file: its bytes, and their SHA-256 in hexadecimal."""

    model_config = STRICT
    size: int
    sha256: str


class Manifest(BaseModel):
    """What manifest.json holds."""

    model_config = ConfigDict(strict=True)
    format: Literal[1] = Field(description="format 1")
    files: dict[str, FileEntry]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Read once: a process can only ask for it by setting it, and other threads make files meanwhile.
UMASK = _umask()


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path`, with its manifest, when the block succeeds.

    Every file and the directories are fsynced before and after the rename; when the block
    fails, the temporary directory is removed and nothing else has changed. Raises
    CheckpointError where `path` exists already, OSError where the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists already: a checkpoint is never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield folder
        manifest = Manifest(format=1, files={n: digest(folder / n) for n in _names(folder)})
        write_json(folder / MANIFEST, manifest.model_dump())
        # Temporary directories and tensor files are private: give them the usual permissions.
        for directory, _, files in os.walk(folder):
            for name in files:
                Path(directory, name).chmod(0o666 & ~UMASK)
                _fsync(Path(directory, name))
            Path(directory).chmod(0o777 & ~UMASK)
            _fsync(Path(directory))
        folder.rename(path)
        _fsync(path.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        # An error of safetensors has that of the operating system in its text alone.
        system = isinstance(error, SafetensorError) and SYSTEM_ERROR.search(str(error))
        if system:
            code = int(system[1])
            raise OSError(code, os.strerror(code), str(path)) from error
        raise


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def replace_file(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file atomically: under a temporary name, flushed to the disk, then renamed.

    A device or a named pipe is written to as it is. Raises OSError where the disk refuses; an
    earlier file of the name is then unchanged.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(b"".join(pieces))
        return
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o666 & ~UMASK)
        Path(name).replace(path)
        _fsync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def sweep(directory: Path, name: str = "") -> None:
    """Remove what killed writers left in `directory`, of paths whose names start with `name`.

    Call it while holding the lock under which they are written.
    """
    for leftover in Path(directory).glob(f".{name}*.tmp"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def verify(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`, after every file was compared with it.

    Raises CheckpointError where there is no manifest, where a file is missing, a link or of
    another size or content, and where one that could be read is not listed; see `is_read`.
    """
    manifest = read_manifest(path)
    problem = _shape_problem(path, manifest.files)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}")
    for name, entry in manifest.files.items():
        if digest(path / name) != entry:
            raise CheckpointError(f"{path / name} was altered: its SHA-256 is not the manifest's")
    return manifest


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint's manifest, or the names and sizes of its files."""
    try:
        return _shape_problem(path, read_manifest(path).files)
    except CheckpointError as error:
        return str(error)


def complete(path: Path) -> bool:
    """Whether the checkpoint has a manifest, and every file of it with its size."""
    return damage(path) is None


def latest(directory: Path, *, say: Callable[[str], None] = warn) -> Path | None:
    """The newest complete checkpoint `step-NNNNNN` in `directory`, or None.

    Steps compare as numbers. Contents are not compared with the manifest; `verify` does that.
    `say` gets a line for each newer step that is passed over.
    """
    for step in reversed(steps(directory)):
        path = step_path(directory, step)
        problem = damage(path)
        if problem is None:
            return path
        say(f"{path} is passed over, as it is not complete: {problem}")
    return None


def step_path(directory: Path, step: int) -> Path:
    """The path of the checkpoint after `step` steps.

    >>> step_path(Path("run"), 40).name
    'step-000040'
    """
    return Path(directory) / f"step-{step:06d}"


def steps(directory: Path) -> list[int]:
    """The steps with a directory of their name in `directory`, complete or not, ascending."""
    directory = Path(directory)
    entries = directory.iterdir() if directory.is_dir() else ()
    matches = (STEP_NAME.fullmatch(entry.name) for entry in entries if entry.is_dir())
    return sorted(int(match[1]) for match in matches if match)


@contextmanager
def locked(directory: Path, name: str = ".lock") -> Iterator[None]:
    """An exclusive lock on the file `name` in `directory`, for one writing process at a time.

    The lock of a process that ends is released; the file that stays has no meaning. Raises
    CheckpointError where another process holds it.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{directory} is not a directory: expected one to write to") from None
    path = directory / name
    if os.path.lexists(path) and not path.is_file():
        raise ConfigError(f"{path} is not a plain file: expected one, or none")
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        owner = path.read_text(encoding="utf-8", errors="replace").strip()[:32] or "unknown"
        raise CheckpointError(
            f"{directory} is being written by process {owner}: wait for it or use another --out"
        ) from None
    try:
        path.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def read_manifest(path: Path, *, root: Path | None = None) -> Manifest:
    """The manifest of a checkpoint, checked by itself; names may lead anywhere in `root`."""
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path} has no {MANIFEST}: it is incomplete or of another tool")
    manifest = parse_settings(
        Manifest, read_json(path / MANIFEST), origin=str(path / MANIFEST), error=CheckpointError
    )
    for name in manifest.files:
        inside(path, name, root=root)
    return manifest


def _shape_problem(path: Path, listed: Mapping[str, FileEntry]) -> str | None:
    """What is wrong with the names, kinds and sizes of the files, or None."""
    for name in sorted(listed):
        try:
            status = (path / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is not a plain file"
        if status.st_size != listed[name].size:
            return f"{name} has {status.st_size} bytes, the manifest says {listed[name].size}"
    for name in _names(path):
        if name not in listed and is_read(path / name):
            return f"{name} is not in the manifest, but could be read as a part of the model"
    return None


def _names(folder: Path) -> list[str]:
    """Every visible file of the directory but the manifest, sorted, with forward slashes."""
    names = (path.relative_to(folder).as_posix() for path in visible(folder))
    return sorted(name for name in names if name != MANIFEST)


def digest(path: Path) -> FileEntry:
    """The size and the SHA-256 of a file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return FileEntry(size=size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
