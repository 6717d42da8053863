"""Output of every command: results to stdout, progress and messages to stderr."""

import json
import os
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from mdiff.cli.views.streams import holds_unicode
from mdiff.errors import ConfigError


def result(text: str) -> None:
    """One line or page of the result, to stdout; a terminal gets no control characters."""
    print(printable(text) if sys.stdout.isatty() else text, flush=True)


def printable(text: str) -> str:
    """The text with U+FFFD for control characters that a terminal executes: all but \\n, \\t."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\ufffd"
        for character in text
    )


def result_json(value: Mapping[str, object]) -> None:
    """One JSON object on one line, to stdout; NaN and infinities are null, as JSON has none.

    Where the stream does not hold all of Unicode, the JSON is ASCII.
    """
    print(json.dumps(_finite(value), ensure_ascii=not holds_unicode(sys.stdout)), flush=True)


def message(text: str) -> None:
    """A message, to stderr."""
    print(text, file=sys.stderr, flush=True)


def is_coloured(stream: TextIO) -> bool:
    """Whether colour may be used: a terminal, and NO_COLOR unset or empty (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def writable(path: Path | None) -> Path | None:
    """The path; ConfigError where no file can be written there."""
    if path is None:
        return None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"no file can be written there: {str(error)[:120]}") from None
    if path.is_dir():
        raise ConfigError(f"{path} is a directory: expected a file name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path}: no permission to write there")
    return path


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
