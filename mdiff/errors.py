"""The errors that a user can meet, and the exit code of each."""

import logging
from collections.abc import Iterable
from difflib import get_close_matches

# Of a message: a value of a hostile file can be of any length.
MOST_CHARACTERS = 2000


def one_line(text: str) -> str:
    """The text as one printable line of at most MOST_CHARACTERS."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS - 3]}..."
    # Line ends, what steers a terminal, and halves of characters, which cannot be written.
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def warn(text: str) -> None:
    """Log one printable line of what is not as it may seem, but no error.

    Without a handler of the caller's, Python writes it to stderr.
    """
    logging.getLogger("mdiff").warning("%s", one_line(text))


class MdiffError(Exception):
    """An error that mdiff raises on purpose; `exit_code` is the command line's.

    Its message is one printable line of at most MOST_CHARACTERS, whatever a file put into it.
    """

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(MdiffError, ValueError):
    """An option, a recipe or an argument that is invalid."""

    exit_code = 2


class DataError(MdiffError, ValueError):
    """Input that is missing, unreadable or does not fit the model."""

    exit_code = 3


class CheckpointError(MdiffError, ValueError):
    """A checkpoint that is incomplete, altered, unsafe or of another layout."""

    exit_code = 4


class BackendError(MdiffError, RuntimeError):
    """A backend, a device or an optional dependency that is not there."""

    exit_code = 5


class MdiffWarning(UserWarning):
    """What was done otherwise than the files or the call say; Python's `warnings` filters it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them.

    >>> nearest("cosin", ["cosine", "linear"])
    "did you mean 'cosine'?"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
