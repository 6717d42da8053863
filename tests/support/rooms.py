"""The package as its source shows it: rooms, imports, sizes. Nothing of it is imported.

Shared by tests/test_layout.py, which asserts bounds, and benchmarks/structure.py, which prints
the figures.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# From the ground up. A file imports rooms of lower floors and its own room, never another on its
# own floor.
FLOORS: list[set[str]] = [
    {"errors", "kernels", "process_state"},
    {"tokens", "schedule", "ops", "find", "files"},
    {"denoiser", "process"},
    {"objective", "sampling", "backbones", "modalities"},
    {"samplers"},
    {"pipeline"},
    {"training", "evaluation"},
    {"sweeps"},
    {"cli"},
]
# Entries of a folder beside its __init__.py; rooms whose files are parts or commands hold more.
MOST_AT_THE_TOP, MOST_IN_A_FOLDER = 23, 13
OF_PARTS = {
    "kernels", "samplers", "backbones", "backbones/published", "modalities/image/codecs", "cli",
}  # fmt: skip
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_ARGUMENTS = 300, 50, 12
# Rooms whose functions take every option of theirs by name.
MANY_ARGUMENTS = ("kernels", "samplers", "cli")

Arrow = tuple[str, str]


@dataclass(frozen=True)
class Source:
    """A Python file of the package: its dotted `name` below mdiff, as files.atomic."""

    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        """What stands in it."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def lines(self) -> list[str]:
        """Its lines."""
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """The first part of its name."""
        return self.name.partition(".")[0]

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


class Package:
    """The folder mdiff of a repository, with the two linked rooms."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "mdiff"

    @cached_property
    def sources(self) -> list[Source]:
        """Every module but the package's own __init__, sorted by path."""
        paths = sorted(
            Path(base) / file
            for base, _, files in os.walk(self.folder, followlinks=True)
            for file in files
            if file.endswith(".py")
        )
        named = [(dotted(path.relative_to(self.folder)), path) for path in paths]
        return [Source(name, path) for name, path in named if name]

    @cached_property
    def every(self) -> list[Source]:
        """The sources and the package's own __init__."""
        return [Source("", self.folder / "__init__.py"), *self.sources]

    @cached_property
    def arrows(self) -> list[Arrow]:
        """(importing file, imported file or folder) of every import inside the package."""
        faces = {s.name: exported(s.tree) for s in self.sources if s.path.name == "__init__.py"}
        known = {source.name for source in self.sources}
        # A name that a face exports may be that of a file beside it.
        known -= {f"{folder}.{name}" for folder, names in faces.items() for name in names}
        return sorted(
            {
                (source.name, imported)
                for source in self.sources
                for imported in imports(source.tree, known)
                if imported and not imported.startswith("__")
            }
        )

    def around_faces(self) -> list[str]:
        """The imports of a file of another room that is no part: not by the room's face."""
        folders = {folder.replace("/", ".") for folder in self.entries()}
        parts = {folder.replace("/", ".") for folder in OF_PARTS}
        return [
            f"{name} imports {imported}"
            for name, imported in self.arrows
            if name.partition(".")[0] != imported.partition(".")[0]
            and "." in imported
            and imported not in folders
            and imported.rpartition(".")[0] not in parts
        ]

    def count(self, pattern: str, *, imports: bool = True) -> dict[str, int]:
        """How often a pattern occurs in each file where it does; `imports`: in import lines too."""
        compiled = re.compile(pattern)
        found = {}
        for source in self.every:
            skipped = set() if imports else import_lines(source.tree)
            found[source.name] = sum(
                len(compiled.findall(line))
                for number, line in enumerate(source.lines, start=1)
                if number not in skipped
            )
        return {name: number for name, number in found.items() if number}

    def lines(self) -> int:
        """The lines of all Python files."""
        return sum(len(source.lines) for source in self.every)

    def long_files(self, most: int = MOST_LINES) -> dict[str, int]:
        """The Python and C files of more lines, by the path below mdiff."""
        paths = [source.path for source in self.every]
        paths += sorted((self.folder / "kernels").glob("*.c"))
        found = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
        return {
            str(path.relative_to(self.folder)): number
            for path, number in found.items()
            if number > most
        }

    def long_functions(self, most: int = MOST_LINES_OF_A_FUNCTION) -> dict[str, int]:
        """The functions of more lines; the docstring counts, decorators and signature do not."""
        return {
            f"{source.name}.{node.name}": size
            for source in self.every
            for node in source.functions()
            if (size := node.end_lineno - node.body[0].lineno + 1) > most
        }

    def wide_functions(self, most: int = MOST_ARGUMENTS) -> dict[str, int]:
        """The functions with more arguments, self and ** among them, outside MANY_ARGUMENTS."""
        return {
            f"{source.name}.{node.name}": number
            for source in self.every
            if source.room not in MANY_ARGUMENTS
            for node in source.functions()
            if (number := arguments(node.args)) > most
        }

    def full_folders(self) -> dict[str, int]:
        """The folders that hold more entries than a room may; "." is the top."""
        return {
            folder: number
            for folder, number in self.entries().items()
            if folder not in OF_PARTS
            and number > (MOST_AT_THE_TOP if folder == "." else MOST_IN_A_FOLDER)
        }

    def entries(self) -> dict[str, int]:
        """How many files and folders each folder holds beside its __init__.py."""
        found = {}
        for base, folders, files in os.walk(self.folder, followlinks=True):
            folders[:] = [name for name in folders if name not in ("__pycache__", "builtin")]
            modules = [name for name in files if name.endswith(".py") and name != "__init__.py"]
            found[str(Path(base).relative_to(self.folder))] = len(modules) + len(folders)
        return found


def dotted(path: Path) -> str:
    """The name of a file or a folder below the package, such as files.atomic."""
    return ".".join(part for part in path.with_suffix("").parts if part != "__init__")


def exported(tree: ast.Module) -> set[str]:
    """The names that the import statements of a face bind."""
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The files and folders of the package that a file imports, at any depth of its code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module != "mdiff" and not node.module.startswith("mdiff."):
                continue
            origin = node.module.removeprefix("mdiff").removeprefix(".")
            for alias in node.names:
                inside = f"{origin}.{alias.name}" if origin else alias.name
                yield inside if inside in known else origin
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mdiff."):
                    yield alias.name.removeprefix("mdiff.")


def import_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines of all import statements."""
    return {
        number
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, node.end_lineno + 1)
    }


def arguments(of: ast.arguments) -> int:
    """How many arguments a function names, * and ** among them."""
    named = [*of.posonlyargs, *of.args, *of.kwonlyargs]
    return len(named) + (of.vararg is not None) + (of.kwarg is not None)


def floor(name: str) -> int:
    """The floor of a file's room; a file at the top that has none lies above all of them."""
    room = name.partition(".")[0]
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), len(FLOORS))


def wrong_arrows(arrows: Iterable[Arrow]) -> list[str]:
    """The arrows that do not point to a lower floor or into their own room."""
    return [
        f"{name} imports {imported}"
        for name, imported in arrows
        if name.partition(".")[0] != imported.partition(".")[0] and floor(imported) >= floor(name)
    ]


def circles(arrows: Iterable[Arrow]) -> list[tuple[str, ...]]:
    """The groups of files that import each other, directly or through others."""
    to: dict[str, set[str]] = {}
    for name, imported in arrows:
        to.setdefault(name, set()).add(imported)
    reached = {}
    for start in to:
        found, left = set(), [start]
        while left:
            for other in to.get(left.pop(), ()):
                if other not in found:
                    found.add(other)
                    left.append(other)
        reached[start] = found
    return sorted({
        tuple(sorted(other for other in found if start in reached.get(other, ())))
        for start, found in reached.items() if start in found
    })  # fmt: skip
