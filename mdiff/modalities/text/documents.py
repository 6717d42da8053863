"""Where documents come from: text files, JSONL, Parquet, the Hub or the standard library."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from io import BufferedIOBase
from itertools import accumulate
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from mdiff.errors import ConfigError, DataError, nearest
from mdiff.files import MAX_JSON_VALUES, STRICT, has_too_many_values
from mdiff.modalities.text.source import HUB, SPLITS, DataSource
from mdiff.modalities.text.tables import PARQUET, Row, hub_texts, parquet_rows, text_in
from mdiff.modalities.text.tables import check_growth as check_growth
from mdiff.modalities.text.tables import hub_rows as hub_rows

STANDARD_LIBRARY = "pydoc_data.topics"
READ_AT_ONCE = 2**20
GZIP = b"\x1f\x8b"
TABLES, LINES = (".parquet", ".pq"), (".jsonl", ".ndjson", ".json")
_TABLE = "a table: write the column as .jsonl or .parquet"
_ARCHIVE = "an archive: unpack it first"
_BINARY = "no text: extract it first"
# Formats that people have and that would be read as text, or refused as damaged text.
OTHERS = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".orc"), _TABLE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"), _ARCHIVE),
    **dict.fromkeys((".pdf", ".doc", ".docx", ".odt", ".epub", ".npy", ".npz"), _BINARY),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".db"), _BINARY),
}
# What a pipe or a device may give: it says no size, and may have no end.
MOST_OF_A_PIPE = 2**30
# Characters of one JSON line.
MOST_OF_A_LINE = 2**23

# A document: text, or token ids.
Piece = TypeVar("Piece", str, list[int])


@dataclass(config=STRICT, frozen=True)
class Source(DataSource):
    """The `data` section of a recipe for text.

    `source`: a path or a list of paths (.txt, .jsonl, .parquet, each also .gz but Parquet, in any
    case; ~ is the home), "hub:OWNER/NAME", or "pydoc_data.topics", the help texts of Python's
    standard library.
    `field` is the JSONL, Parquet or Hub column. A text file is one document, unless `separator`
    cuts it into several. `holdout` and `validation` are fractions of the characters.
    """

    field: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = None

    def documents(self) -> list[str]:
        """Every document that is not empty, in order.

        Raises DataError with the file and the line, row or byte where one cannot be read.
        """
        rows = self.rows(self.field)
        found = [text for where, row in rows if (text := text_in(row, self.field, where))]
        if not found:
            raise DataError(f"{self.source}: there is no text in it")
        return found

    def rows(self, field: str, *, lines: bool = False) -> Iterator[Row]:
        """The rows of all paths, each with its name for messages; a plain text is {field: text}.

        With `lines` a file of no known format holds JSON lines, not a plain text.
        """
        for path in self.paths:
            yield from self._rows(path, field, lines=lines)

    def _rows(self, path: str, field: str, *, lines: bool) -> Iterator[Row]:
        if path == STANDARD_LIBRARY:
            from pydoc_data.topics import topics

            return (("", {field: topics[name]}) for name in sorted(topics))
        if path.startswith(HUB):
            return hub_texts(path.removeprefix(HUB), self.subset, self.hub_split, field)
        file = Path(path)
        name = file.name.lower()
        if name.endswith(TABLES) or _begins_with(file, PARQUET):
            if not file.is_file():
                raise DataError(f"{path}: no such file{_neighbour(file)}")
            return parquet_rows(file, field)
        ending = Path(name.removesuffix(".gz")).suffix
        if ending in OTHERS:
            raise DataError(f"{path} is {OTHERS[ending]}; known: .txt, .jsonl, .parquet, and .gz")
        text = read_text(file)
        if ending == ".json" and text.lstrip().startswith("["):
            raise DataError(f"{path} is one JSON list: write a line for each entry, .jsonl")
        if lines or ending in LINES:
            return numbered_lines(text, path)
        cut = text.split(self.separator) if self.separator else [text]
        return ((path, {field: piece}) for piece in cut)


def cut_documents(
    documents: Sequence[Piece], split: str, *, holdout: float, validation: float
) -> list[Piece]:
    """The documents of a split, cut at exact units (characters of text) of their concatenation.

    Of C units the first int(C (1 - holdout)) are for training; of those, the last
    `validation` fraction is for choosing. A document that a cut meets is in both sides.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}; {nearest(split, SPLITS)}")
    total = sum(map(len, documents))
    kept = int(total * (1 - holdout))
    chosen = int(kept * (1 - validation))
    cuts = (0, chosen, kept, total)
    first, stop = cuts[SPLITS.index(split) :][:2]
    if first == stop:
        raise DataError(f"the {split} split of {total} units is empty at {holdout=}, {validation=}")
    starts = accumulate(map(len, documents), initial=0)
    cut = (text[max(0, first - at) : max(0, stop - at)] for text, at in zip(documents, starts))
    return [piece for piece in cut if piece]


def digest(documents: list[str]) -> str:
    """SHA-256 of the documents' UTF-8, one after the other; of one document, that of its text."""
    total = hashlib.sha256()
    for text in documents:
        total.update(text.encode())
    return total.hexdigest()


def read_text(path: str | Path) -> str:
    """A file as text: UTF-8, unpacked where it is gzip, a byte-order mark dropped.

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
    """A file's bytes, unpacked where it is gzip; DataError where it cannot be read."""
    try:
        if path.suffix.lower() == ".gz" or _begins_with(path, GZIP):
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
    except DataError:
        raise
    except (OSError, ValueError) as error:
        # A name that is too long or holds a zero byte, a circle of links, a disk.
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(content) > MOST_OF_A_PIPE:
        raise DataError(f"{path} is no file, and gives more than {MOST_OF_A_PIPE:,} bytes")
    return content


def _begins_with(path: Path, magic: bytes) -> bool:
    """Whether a plain file begins with these bytes; a pipe is not asked."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except (OSError, ValueError):
        return False


def pieces(file: BufferedIOBase, path: Path) -> Iterator[bytes]:
    """What an open file holds, a piece at a time; DataError once it is a bomb (`check_growth`)."""
    total = 0
    while piece := file.read(READ_AT_ONCE):
        yield piece
        total += len(piece)
        check_growth(total, path)


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
    for where, row in numbered_lines(text, path):
        if field is not None:
            text_in(row, field, where)
        yield row


def numbered_lines(text: str, path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a JSONL file, each with its line and byte offset for messages."""
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
            yield where, row
        offset += len(line.encode()) + 1
