"""The errors that a user can meet, and the exit code of each."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MdiffError(Exception):
    """Any error that mdiff raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class ConfigError(MdiffError, ValueError):
    """An option, a recipe or an argument that cannot be meant."""

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


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them.

    >>> nearest("cosin", ["cosine", "linear"])
    "did you mean 'cosine'?"
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
