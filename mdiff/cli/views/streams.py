"""Standard streams on which printing never fails.

What nobody can read is lost, and nothing else: the work goes on to its end, with its files and
its exit code. Where the result itself could not be written, `unwritten` says why.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ERRORS = "mdiff_printed"
# For characters of ours that an encoding lacks; all others are written as escapes.
STAND_INS = {"±": "+-", "░": "_"}


def _printed(error: UnicodeError) -> tuple[str, int]:
    """What is written where an encoding lacks characters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    text = "".join(STAND_INS.get(character, character) for character in lacking)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error(ERRORS, _printed)


class Output(io.FileIO):
    """The file of a standard stream; after the first error all that is written is discarded."""

    fault: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or discard; how many bytes were taken."""
        if self.fault is None:
            try:
                while (written := super().write(data)) is None:
                    # A full pipe that whoever started this process has made non-blocking.
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.fault = error
        return memoryview(data).nbytes


class Printed(io.TextIOWrapper):
    """A standard stream in its own encoding, on an `Output`."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        # Kept, since it would close the descriptor.
        self.replaced = stream
        self.output = Output(stream.fileno(), "wb", closefd=False)
        # Another choice of PYTHONIOENCODING is the user's.
        chosen = stream.errors not in ("strict", "surrogateescape", "backslashreplace")
        super().__init__(
            io.BufferedWriter(self.output), encoding=stream.encoding,
            errors=stream.errors if chosen else ERRORS,
            line_buffering=stream.line_buffering, write_through=stream.write_through,
        )  # fmt: skip


def open_streams() -> None:
    """Replace sys.stdout and sys.stderr by streams on which printing never fails.

    Descriptors 0 to 2 that are closed are opened on the null device: a file of the run would get
    their numbers, and what libraries print there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = _safe(sys.stdout), _safe(sys.stderr)


def _safe(stream: TextIO | None) -> TextIO:
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, Printed):
        return stream
    try:
        return Printed(stream)
    except OSError:
        # It has no descriptor, as in a notebook.
        return stream


def unread() -> bool:
    """Whether what is printed on stdout is discarded: its reader has left, or an error."""
    return isinstance(sys.stdout, Printed) and sys.stdout.output.fault is not None


def unwritten() -> OSError | None:
    """Why stdout could not be written, after flushing both streams.

    None where it could, and where its reader has left: the end of a pipe, a closed terminal.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    fault = sys.stdout.output.fault if isinstance(sys.stdout, Printed) else None
    left = isinstance(fault, ConnectionError) or (fault is not None and fault.errno == errno.EIO)
    return None if left else fault


def holds_unicode(stream: TextIO) -> bool:
    """Whether every character can be written to the stream as it is."""
    return (stream.encoding or "utf-8").lower().startswith("utf")
