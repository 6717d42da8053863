"""Rows of data: Parquet files, data sets of the Hub, and the check of the text in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.errors import BackendError, DataError, nearest
from mdiff.modalities.text.source import HUB

if TYPE_CHECKING:
    from datasets import Dataset

# A row of a file, and its name for messages.
Row = tuple[str, Mapping[str, object]]
PARQUET = b"PAR1"
ROWS_AT_ONCE = 1024
# Text in .gz shrinks some four times, pictures ten: what grows more, and to more, is a bomb.
MOST_UNPACKED, MOST_GROWTH = 2**27, 50


def check_growth(unpacked: int, path: Path) -> None:
    """Raise DataError where so many bytes came, or would come, out of a file that is small."""
    if unpacked > MOST_UNPACKED and unpacked > MOST_GROWTH * path.stat().st_size:
        raise DataError(
            f"{path} unpacks to over {MOST_GROWTH} times its size, {unpacked:,} bytes or more: "
            "unpack it yourself if it is meant"
        )


def parquet_rows(path: Path, field: str) -> Iterator[Row]:
    """The rows {field: value} of a Parquet file, read a row group at a time.

    Raises DataError where it cannot be read, has no such column or unpacks to too much.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    first = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise DataError(f"{path} has no column {field!r}; {nearest(field, names)}")
            for group in range(file.num_row_groups):
                check_growth(file.metadata.row_group(group).total_byte_size, path)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[field]):
                for number, value in enumerate(batch.column(0).to_pylist(), start=first + 1):
                    yield f"{path}, row {number}", {field: value}
                first += len(batch)
    except UnicodeDecodeError:
        raise DataError(
            f"{path}: {field!r} is not UTF-8 in row {first + 1} or one of the {ROWS_AT_ONCE} on"
        ) from None
    except DataError:
        raise
    except (ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is not readable Parquet: {_first_line(error)}") from error


def hub_texts(name: str, subset: str | None, split: str, field: str) -> Iterator[Row]:
    """The rows {field: value} of a data set of the Hub."""
    rows = hub_rows(name, subset, split)
    if field not in rows.column_names:
        raise DataError(f"{HUB}{name} has no column {field!r}; {nearest(field, rows.column_names)}")
    for number, row in enumerate(rows.select_columns([field]), start=1):
        yield f"{HUB}{name}, row {number}", row


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


def text_in(row: Mapping[str, object], field: str, where: str) -> str:
    """The text in a field of a row; DataError with `where` for null, another type, no Unicode."""
    value = row.get(field)
    if not isinstance(value, str):
        got = "null" if value is None else f"of type {type(value).__name__}"
        why = f"it is {got}" if field in row else nearest(field, map(str, row))
        raise DataError(f"{where} has no string {field!r}; {why}")
    check_unicode(value, f"{where}: {field!r}: ")
    return value


def check_unicode(text: str, where: str = "") -> None:
    """Raise DataError where a text holds half a character, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}character {error.start} is not valid Unicode text") from None


def checked_text(value: object) -> str:
    """The value; DataError where it is no text or not valid Unicode."""
    if not isinstance(value, str):
        raise DataError(f"{value!r:.60}: expected a text, got {type(value).__name__}")
    check_unicode(value)
    return value


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
