"""Untrusted JSON and safetensors files, checked before they are used.

Nothing here unpickles, no name leads out of its directory, and every refusal is a
CheckpointError before anything is loaded.
"""

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mdiff.errors import CheckpointError

# The longest name in usual file systems.
MAX_NAME_BYTES = 255
# Larger than any tokenizer or index file in use, and parsed well within a second or two.
MAX_JSON_BYTES = 32 * 2**20
# Ten times as many values as the index of the largest public models; the parser takes some
# hundred bytes for each. Files shorter than COUNTED_FROM cannot hold too many.
MAX_JSON_VALUES, COUNTED_FROM = 10**6, 2**20
# Configurations nest a handful of levels; a file must not exhaust the parser's stack.
MAX_JSON_DEPTH = 64
# The header of the largest public models is about 1 MB.
MAX_HEADER_BYTES = 32 * 2**20
# In one file: the largest public models have some hundred in each.
MAX_TENSORS = 30_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# A zip archive (torch.save), a pickle of protocol 2 to 5, and torch's oldest magic number.
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# The types of the safetensors format that torch has.
TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# What readers of models and tokenizers look for, in lower case: settings, weights, templates,
# vocabularies. A text file is one of a tokenizer only by its name.
READ_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".tiktoken", ".spm", ".tokenizer")
READ_NAMES = {"vocab.txt", "merges.txt", "dict.txt", "vocab.bpe", "bpe.codes"}


class TensorEntry(TypedDict):
    """The entry of a tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    # The bytes [begin, end) of the data after the header.
    data_offsets: list[int]


# The tensors of a safetensors file by name.
Header = dict[str, TensorEntry]


def inside(folder: Path, name: str, *, root: Path | None = None) -> Path:
    """The file `name` of `folder`; CheckpointError where that leaves `root` (or `folder`).

    Refused: absolute names, `..`, backslashes, and links that lead out of `root`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise CheckpointError(f"file name {name!r}: expected a plain name inside {folder}")
    try:
        longest = max(len(part.encode("utf-8")) for part in parts)
    except UnicodeEncodeError:
        raise CheckpointError(f"file name {name[:80]!r}: not a name in UTF-8") from None
    if longest > MAX_NAME_BYTES:
        raise CheckpointError(f"file name {name[:80]!r}...: longer than {MAX_NAME_BYTES} bytes")
    path = Path(folder, *parts)
    home = Path(root or folder).resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path} is a link in a circle") from None
    if not target.is_relative_to(home):
        raise CheckpointError(f"{path} is a link that leaves {home}")
    return path


def visible(folder: Path) -> Iterator[Path]:
    """Every file in the directory and below that is not hidden; a linked folder, not entered.

    Hidden is what systems and tools leave for themselves: .git, .cache, .DS_Store, .nfs...
    """
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in files if not name.startswith(".")]
        paths = [Path(directory, name) for name in (*sorted(names), *folders)]
        yield from (path for path in paths if path.name in names or path.is_symlink())


def is_read(path: Path) -> bool:
    """Whether a reader of models or tokenizers may look for a file of this name.

    What no reader looks for cannot damage a checkpoint: a README, a licence, pictures, logs. Of a
    linked folder it is not known.
    """
    name = path.name.lower()
    return name.endswith(READ_SUFFIXES) or name in READ_NAMES or path.is_dir()


def refuse_special(folder: Path) -> None:
    """Raise CheckpointError where `folder` holds a pipe, a device or a socket: a library that
    is given the folder would block on it.
    """
    for path in visible(folder):
        # A link without a target is left to its reader, a linked folder is not entered.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is not a plain file")


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises CheckpointError where the file is missing, too large, not JSON, nested too deep,
    has a key twice or is not an object.
    """
    return parse_json(_read(path, max_bytes), origin=str(path))


def parse_json(data: bytes, *, origin: str) -> dict[str, Any]:
    """The JSON object in `data`; CheckpointError names `origin`. See `read_json`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{origin}: the key {twice[:80]!r} occurs twice")
        return found

    try:
        text = data.decode("utf-8")
        if has_too_many_values(text):
            raise CheckpointError(f"{origin} has over {MAX_JSON_VALUES} commas and brackets")
        value = json.loads(text, object_pairs_hook=unique)
        if isinstance(value, dict) and _depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
    except RecursionError:
        raise CheckpointError(f"{origin} is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{origin} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{origin} holds a {type(value).__name__}: expected an object")
    return value


def _depth(value: dict[str, Any] | list[Any]) -> int:
    """How many objects and lists are in each other; RecursionError for very many."""
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(each) for each in inner if isinstance(each, dict | list)), default=0)


def has_too_many_values(text: str) -> bool:
    """Whether JSON could hold more than MAX_JSON_VALUES values; faster than parsing it."""
    return len(text) >= COUNTED_FROM and sum(map(text.count, ",[{")) > MAX_JSON_VALUES


def read_tensors(path: Path, *, header: Header | None = None) -> dict[str, Tensor]:
    """The tensors of the safetensors file `path`, by name, on the CPU.

    `header` is the result of `check_tensors`, where there is one already. Raises
    CheckpointError, with nothing loaded, for a pickle (by its name or its first bytes), a
    truncated file, and a header that does not describe exactly the data in the file.
    """
    path = Path(path)
    if header is None:
        check_tensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None


def check_tensors(path: Path) -> Header:
    """The header of the safetensors file `path`, checked against the size of the file.

    Raises CheckpointError; no tensor is read.
    """
    path = Path(path)
    with _regular_file(path) as (file, size):
        start = file.read(8)
        # The library would call it a header that is too large.
        if path.suffix in PICKLE_SUFFIXES or start.startswith(PICKLE_STARTS):
            raise CheckpointError(
                f"{path} is a pickle, which can run code: only safetensors files are opened"
            )
        length = int.from_bytes(start, "little")
        inside_file = length <= size - 8
        # The library reads headers of 100 MB and of any number of tensors, and takes the last of
        # two entries of a name.
        if inside_file and length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} has a header of {length} bytes: at most {MAX_HEADER_BYTES} are read"
            )
        text = file.read(length) if inside_file else b"{}"
    header = parse_json(text, origin=f"the header of {path}")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(header)} tensors: at most {MAX_TENSORS} are read")
    try:
        # Types, shapes and offsets: whether they describe exactly the data that follows.
        with safe_open(path, framework="numpy"):
            return header
    except (SafetensorError, OSError) as error:
        fault = _fault(header, size - 8 - length) if inside_file else None
        raise CheckpointError(
            f"{path} is truncated or altered, or is not a safetensors file: {fault or error}"
        ) from None


def _fault(header: dict[str, Any], data_bytes: int) -> str | None:
    """What a header that the library refuses gets wrong, by the tensor; None where not known."""
    runs, total = [], 0
    for name, entry in header.items():
        try:
            shape, (begin, end) = entry["shape"], entry["data_offsets"]
            # The product of a hostile shape must not be a number of any length.
            if len(shape) > 64 or any(type(n) is not int or n >> 64 for n in (begin, end, *shape)):
                raise ValueError
            needed = math.prod(shape) * TYPES[entry["dtype"]].itemsize
        except (KeyError, TypeError, ValueError):
            return f"the header entry {name[:80]!r} = {entry!r:.200} is not valid or not read here"
        if end - begin != needed:
            given = f"needs {needed} bytes, the header gives it {end - begin}"
            return f"{name[:80]!r} of shape {shape} {given}"
        runs.append((begin, end, repr(name[:80])))
    for begin, end, what in [*sorted(runs), (data_bytes, 0, "the end of the file")]:
        if begin != total:
            return f"{what} is at byte {begin}, expected {total}: the data overlaps or has a hole"
        total = end
    return None


def _read(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file of at most `max_bytes`."""
    with _regular_file(path) as (file, size):
        if size > max_bytes:
            raise CheckpointError(f"{path} has {size} bytes: at most {max_bytes} are read")
        return file.read()


@contextmanager
def _regular_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The open file and its size in bytes; a pipe or a device is refused before it is opened."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a plain file")
        with path.open("rb") as file:
            yield file, status.st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
