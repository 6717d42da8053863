"""What the pages of the documentation hold: links, blocks, commands, code in a line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from folders import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
# A paragraph indented by four, after an empty line: of a list it would be a continuation.
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# `[--flag NAME]` of a synopsis is an option that may be left out.
OPTIONAL = re.compile(r"\[(--[^\[\]]*)\]")


class Block(NamedTuple):
    """A block of code with its language, "" where none is named."""

    language: str
    text: str


@cache
def text_of(name: str) -> str:
    """The text of a page, by its path in the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def prose_of(name: str) -> str:
    """The page without its blocks."""
    return INDENTED.sub("", FENCE.sub("", text_of(name)))


def blocks(name: str) -> list[Block]:
    """The fenced and the indented blocks of a page."""
    fenced = [Block(*found) for found in FENCE.findall(text_of(name))]
    plain = FENCE.sub("", text_of(name))
    return fenced + [Block("", found[0]) for found in INDENTED.finditer(plain)]


def links(name: str) -> list[str]:
    """The targets of links and pictures, without those of other hosts."""
    return [link for link in LINK.findall(prose_of(name)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and the site name them."""
    words = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-") for word in words}


def inline(name: str) -> list[str]:
    """The code within lines of a page, on one line each."""
    return [" ".join(found.split()) for found in INLINE.findall(prose_of(name))]


def command_lines(name: str) -> Iterator[list[str]]:
    """The words of every command of a page that a shell would run, environment left out."""
    lines = inline(name)
    for block in blocks(name):
        if block.language in ("", "sh", "bash"):
            lines += block.text.replace("\\\n", " ").splitlines()
    for line in lines:
        bare = re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", line.strip())
        if re.match(r"(?:mdiff|python|make|accelerate launch|pip install)\b", bare) is None:
            continue
        # A number that the shell computes is one word.
        bare = re.sub(r"\$\(\(.*?\)\)", "1", OPTIONAL.sub(r"\1", bare))
        yield shlex.split(bare, comments=True)


def mdiff_lines(name: str) -> Iterator[list[str]]:
    """The arguments of every command line of mdiff on a page, of `-m mdiff` too."""
    for words in command_lines(name):
        if words[0] == "mdiff":
            yield words[1:]
        elif words[-1] != "mdiff" and "mdiff" in words and words[words.index("mdiff") - 1] == "-m":
            yield words[words.index("mdiff") + 1 :]
