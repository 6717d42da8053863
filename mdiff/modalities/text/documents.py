"""Where documents come from: text files, JSONL, Parquet, the Hub or the standard library."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from mdiff.errors import BackendError, ConfigError, DataError, nearest
from mdiff.files import MAX_JSON_VALUES, STRICT, has_too_many_values
from mdiff.modalities.text.source import HUB, SPLITS, DataSource

if TYPE_CHECKING:
    from datasets import Dataset

STANDARD_LIBRARY = "pydoc_data.topics"
# Text in .gz shrinks some four times, pictures ten: what grows more, and to more, is a bomb.
MOST_UNPACKED, MOST_GROWTH = 2**27, 50
READ_AT_ONCE = 2**20
# What a pipe or a device may give: it says no size, and may have no end.
MOST_OF_A_PIPE = 2**30
# Characters of one JSON line.
MOST_OF_A_LINE = 2**23

# A document: text, or token ids.
Piece = TypeVar("Piece", str, list[int])


@dataclass(config=STRICT, frozen=True)
class Source(DataSource):
    """The `data` section of a recipe for text.

    `source`: a path or a list of paths (.txt, .jsonl, .parquet, each also .gz but Parquet),
    "hub:OWNER/NAME", or "pydoc_data.topics", the help texts of Python's standard library.
    `field` is the JSONL, Parquet or Hub column. A text file is one document, unless `separator`
    cuts it into several. `holdout` and `validation` are fractions of the characters.
    """

    field: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None

    def documents(self) -> list[str]:
        """Every document that is not empty, in order.

        Raises DataError with the file and the byte offset where one cannot be read.
        """
        found = [text for path in self.paths for text in self._read(path) if text]
        if not found:
            raise DataError(f"{self.source}: there is no text in it")
        return found

    def _read(self, path: str) -> Iterator[str]:
        if path == STANDARD_LIBRARY:
            return _standard_library()
        if path.startswith(HUB):
            return _hub(path.removeprefix(HUB), self.subset, self.hub_split, self.field)
        plain = path.removesuffix(".gz")
        if plain.endswith(".parquet"):
            return _parquet(Path(path), self.field)
        text = read_text(path)
        if plain.endswith((".jsonl", ".ndjson")):
            return (str(row[self.field]) for row in json_lines(text, path, self.field))
        return iter(text.split(self.separator) if self.separator else [text])


def cut_documents(
    documents: Sequence[Piece], split: str, *, holdout: float, validation: float
) -> list[Piece]:
    """The documents of a split, cut at exact units (characters of text) of their concatenation.

    Of C units the first int(C (1 - holdout)) are for training; of those, the last
    `validation` fraction is for choosing. A document that a cut meets is in both sides.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}; {nearest(split, SPLITS)}")
    total = sum(len(document) for document in documents)
    kept = int(total * (1 - holdout))
    chosen = int(kept * (1 - validation))
    first, stop = {
        "train": (0, chosen),
        "validation": (chosen, kept),
        "holdout": (kept, total),
    }[split]
    if first == stop:
        raise DataError(
            f"the {split} split of {total} units is empty at holdout={holdout}, "
            f"validation={validation}"
        )
    pieces, start = [], 0
    for document in documents:
        piece = document[max(0, first - start) : max(0, stop - start)]
        start += len(document)
        if piece:
            pieces.append(piece)
    return pieces


def digest(documents: list[str]) -> str:
    """SHA-256 of the documents' UTF-8, one after the other; of one document, that of its text."""
    total = hashlib.sha256()
    for text in documents:
        total.update(text.encode())
    return total.hexdigest()


def read_text(path: str | Path) -> str:
    """A file as text: UTF-8, unpacked where the name ends in .gz, a byte-order mark dropped.

    Raises DataError where it is missing, empty, binary, cut short or not UTF-8, with the
    offset of the first bad byte.
    """
    raw = read_bytes(Path(path))
    if not raw:
        raise DataError(f"{path}: the file is empty")
    zero = raw.find(b"\0")
    if zero >= 0:
        raise DataError(f"{path}: byte 0x00 at offset {zero}: this is binary or UTF-16, not UTF-8")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        bad = raw[error.start]
        raise DataError(
            f"{path}: byte 0x{bad:02x} at offset {error.start} is not UTF-8; "
            "convert it, for example with `iconv -f latin1 -t utf-8`"
        ) from None


def read_bytes(path: Path) -> bytes:
    """A file's bytes, unpacked where the name ends in .gz; DataError where it cannot be read."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as file:
                return b"".join(pieces(file, path))
        if path.is_file():
            return path.read_bytes()
        with path.open("rb") as file:
            content = file.read(MOST_OF_A_PIPE + 1)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file{_neighbour(path)}") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a directory: expected a file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be unpacked: {error}") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    if len(content) > MOST_OF_A_PIPE:
        raise DataError(f"{path} is no file, and gives more than {MOST_OF_A_PIPE:,} bytes")
    return content


def pieces(file: BufferedIOBase, path: Path) -> Iterator[bytes]:
    """What an open file holds, a piece at a time; DataError once it is a bomb (`check_growth`)."""
    total = 0
    while piece := file.read(READ_AT_ONCE):
        yield piece
        total += len(piece)
        check_growth(total, path)


def check_growth(unpacked: int, path: Path) -> None:
    """Raise DataError where so many bytes came, or would come, out of a file that is small."""
    if unpacked > MOST_UNPACKED and unpacked > MOST_GROWTH * path.stat().st_size:
        raise DataError(
            f"{path} unpacks to over {MOST_GROWTH} times its size, {unpacked:,} bytes or more: "
            "unpack it yourself if it is meant"
        )


def _neighbour(path: Path) -> str:
    """The end of the message for a missing file: the name that is nearest beside it."""
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; there is no directory {path.parent} either"
    close = get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def json_lines(
    text: str, path: str | Path, field: str | None = None
) -> Iterator[dict[str, object]]:
    """The objects of a JSONL file; DataError with line and byte offset where one is not.

    With `field`, each object must have it and it must be a string.
    """
    offset = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number} (byte {offset})"
            if len(line) > MOST_OF_A_LINE or has_too_many_values(line):
                raise DataError(
                    f"{where} has {len(line)} characters: at most {MOST_OF_A_LINE} are read, of "
                    f"them {MAX_JSON_VALUES} commas and brackets; a .txt file may be of any length"
                )
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: expected an object, got {type(row).__name__}")
            if field is not None and not isinstance(row.get(field), str):
                raise DataError(f"{where} has no string {field!r}; {nearest(field, row)}")
            yield row
        offset += len(line.encode()) + 1


def _standard_library() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _parquet(path: Path, field: str) -> Iterator[str]:
    if not path.is_file():
        raise DataError(f"{path}: no such file{_neighbour(path)}")
    from datasets import load_dataset

    try:
        rows = load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        columns = list(rows.features or [])
    except Exception as error:
        raise DataError(f"{path} is not readable Parquet: {_first_line(error)}") from error
    if field not in columns:
        raise DataError(f"{path} has no column {field!r}; {nearest(field, columns)}")
    return (str(row[field]) for row in rows)


def _hub(name: str, subset: str | None, split: str, field: str) -> Iterator[str]:
    rows = hub_rows(name, subset, split)
    if field not in rows.column_names:
        raise DataError(f"{HUB}{name} has no column {field!r}; {nearest(field, rows.column_names)}")
    return (str(row[field]) for row in rows)


def hub_rows(name: str, subset: str | None, split: str) -> Dataset:
    """A data set of the Hub; DataError for a part that it lacks, BackendError without the Hub."""
    from datasets import load_dataset

    try:
        rows: Dataset = load_dataset(name, subset, split=split)
    except ValueError as error:
        raise DataError(f"{HUB}{name}: {_first_line(error)}") from error
    except Exception as error:
        raise BackendError(f"{HUB}{name} cannot be fetched: {_first_line(error)}") from error
    return rows


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
