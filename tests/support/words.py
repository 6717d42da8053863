"""The word list of plain technical English: what not to write, and the lines that may.

A word counts as a whole word and as a part of a snake_case or CamelCase name, in any case. A line
may hold one where it names a key, flag or name that files or users still have: the comment
`alias:` on it says so (`# alias: --patience`, `<!-- alias: ... -->` in Markdown).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Each word with the pattern that finds it in a text whose CamelCase names are parted.
WORDS = {
    # Torch's term for writing into a tensor is no position.
    "place": r"(?<!in[ _-])places?(?!\w*ment)|in[ _]place[ _]of",
    "told": r"told",
    "sees": r"sees",
    "seen": r"seen",
    "see whom": r"see whom",
    "push": r"push(?:es|ed)?",
    "crew": r"crews?",
    "hire": r"hir(?:e[sd]?|ing)",
    "bury": r"bur(?:y|ies|ied)",
    "patience": r"patience",
    "anew": r"anew",
    "cannot be meant": r"cannot be meant",
    "whole or not there": r"whole or not there",
    "says nothing": r"say(?:s|ing)? nothing",
    "worth": r"worth on data|what a model(?: of \w+)? is worth",
    "dies": r"dies|in peace",
    "gives way": r"(?:gives?|giving|gave) way|makes? way",
}
# Words that are plain English but as the name of an attribute, an argument or a function of mdiff.
NAMES = ("reach", "cells", "splits")
ALIAS = re.compile(r"\balias: ")

CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
SUFFIXES = {".py", ".c", ".md", ".yaml", ".toml", ".html", ""}
FOLDERS = ("mdiff", "kernels", "samplers", "tests", "benchmarks", "examples", "configs", "docs")
# What was written elsewhere or is data, and the list itself.
LEFT_OUT = (
    "LICENSE", "tests/golden/", "tests/support/words.py", "tests/test_words.py",
    "benchmarks/results/", "mdiff/builtin/", "mdiff/kernels", "mdiff/samplers",
)  # fmt: skip


class Hit(NamedTuple):
    """A line that holds a word."""

    path: str
    line: int
    text: str


@cache
def files(root: Path) -> list[Path]:
    """The files that are read: code, recipes, documentation, at the top and in FOLDERS."""
    found = [path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
    for folder in FOLDERS:
        found += [path for path in (root / folder).rglob("*") if path.is_file()]
    return sorted(
        path
        for path in found
        if path.suffix in SUFFIXES
        and "__pycache__" not in path.parts
        and not str(path.relative_to(root)).startswith(LEFT_OUT)
    )


@cache
def read(path: Path) -> tuple[list[str], list[str]]:
    """The lines of a file, and the same with CamelCase names parted."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), CAMEL.sub(" ", text).splitlines()


def hits(word: str, path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that hold a word of WORDS or NAMES and no `alias:`, numbered from 1."""
    lines, parted = read(path)
    if word in WORDS:
        pattern = re.compile(rf"(?<![A-Za-z])(?:{WORDS[word]})(?![a-z])", re.I)
        numbers = [number for number, line in enumerate(parted, start=1) if pattern.search(line)]
    else:
        numbers = sorted({number for name, number in named(path) if name == word})
    for number in numbers:
        if not ALIAS.search(lines[number - 1]):
            yield number, lines[number - 1].strip()


@cache
def named(path: Path) -> list[tuple[str, int]]:
    """Every attribute, argument and function of a Python file of the package, with its line."""
    found: list[tuple[str, int]] = []
    if path.suffix != ".py" or "mdiff" not in path.parts:
        return found
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Attribute(attr=str(name)) | ast.FunctionDef(name=str(name)):
                found.append((name, node.lineno))
            case ast.arg(arg=str(name)) | ast.keyword(arg=str(name)):
                found.append((name, node.lineno))
    return found


def every_hit(root: Path, word: str) -> list[Hit]:
    """The lines of the repository that hold a word, paths below `root`."""
    return [
        Hit(str(path.relative_to(root)), number, line)
        for path in files(root)
        for number, line in hits(word, path)
    ]
