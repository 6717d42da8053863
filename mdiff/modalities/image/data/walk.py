"""The pictures of a folder as people have them: links, hidden files, endings of any case."""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mdiff.errors import DataError

# What other programs leave beside pictures: thumbnails, and the second half of macOS's files.
NOT_DATA = ("__MACOSX", "@eaDir")
HIDDEN, NO_FILE, CIRCLES, UNREADABLE = "hidden", "no files", "links in a circle", "unreadable"
FILE, FOLDER = "file", "folder"
# Links may lead to each other: folders are opened again so many times.
MOST_AGAIN = 100_000
# Kinds of files, and folders, that a line names.
NAMED = 8


@dataclass
class Walk:
    """What `walk` found below `folder`: `files` in order, and how many names of which kind not.

    `empty` are the folders directly in it without any of the files.
    """

    folder: Path
    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """What was left out, "" where nothing was."""
        parts = []
        if self.left_out:
            kinds = [f"{count} {kind}" for kind, count in self.left_out.most_common(NAMED)]
            parts.append(f"{self.left_out.total()} files left out: {_listed(kinds, self.left_out)}")
        if self.empty:
            parts.append(f"no picture in {_listed(self.empty[:NAMED], self.empty)}")
        return f"{self.folder}: {'; '.join(parts)}" if parts else ""


def walk(folder: Path, endings: Collection[str]) -> Walk:
    """The files below a folder with one of the `endings`, in any case, sorted by path.

    Links are followed, but not in a circle. Names that begin with a dot, and what `NOT_DATA`
    lists, are left out at every depth. Raises DataError where links open too many folders.
    """
    found, again = Walk(folder), 0
    first = _identity(folder)
    waiting, opened = [(folder, frozenset([first]))], {first}
    while waiting:
        directory, above = waiting.pop()
        try:
            entries = list(os.scandir(directory))
        except OSError:
            found.left_out[UNREADABLE] += 1
            continue
        kinds = {entry: _kind(entry, endings) for entry in entries}
        found.files += [Path(entry.path) for entry, kind in kinds.items() if kind == FILE]
        found.left_out.update(kind for kind in kinds.values() if kind not in (FILE, FOLDER))
        for entry in (entry for entry, kind in kinds.items() if kind == FOLDER):
            identity = _identity(entry)
            if identity in above:
                found.left_out[CIRCLES] += 1
                continue
            again += identity in opened
            if again > MOST_AGAIN:
                raise DataError(f"{folder}: links lead to one folder over {MOST_AGAIN:,} times")
            opened.add(identity)
            waiting.append((Path(entry.path), above | {identity}))
            if directory == folder:
                found.empty.append(entry.name)
    found.files.sort()
    with_files = {path.relative_to(folder).parts[0] for path in found.files}
    found.empty = sorted(set(found.empty) - with_files)
    return found


def _kind(entry: os.DirEntry[str], endings: Collection[str]) -> str:
    """FOLDER, FILE where it is to be read, or why it is left out."""
    if entry.name.startswith(".") or entry.name in NOT_DATA:
        return HIDDEN
    try:
        if entry.is_dir():
            return FOLDER
        plain = entry.is_file()
    except OSError:
        return NO_FILE
    ending = Path(entry.name).suffix.lower()
    if ending in endings:
        return FILE if plain else NO_FILE
    return ending or "without an ending"


def _identity(path: os.PathLike[str]) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _listed(shown: Iterable[str], of: Collection[str]) -> str:
    named = list(shown)
    return ", ".join(named) + (", ..." if len(named) < len(of) else "")
