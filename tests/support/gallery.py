"""The pictures of docs/gallery.md: python tests/support/gallery.py

Runs the commands of the page, in its order, in docs/pictures; keeps what the page shows.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import chdir
from pathlib import Path

import pages
from folders import ROOT

from mdiff.cli import run

PAGE = "docs/gallery.md"


def shown() -> list[Path]:
    """The files of docs/pictures that the page shows or leads to."""
    return [ROOT / "docs" / link for link in pages.links(PAGE) if link.startswith("pictures/")]


def draw(folder: Path) -> None:
    """Run the commands of the page in a folder; RuntimeError for one that fails."""
    with chdir(folder):
        for words in pages.mdiff_lines(PAGE):
            # In a sentence a command may be named alone.
            if len(words) > 1 and run(words):
                raise RuntimeError(f"mdiff {' '.join(words)} failed")


def main() -> None:
    """Make the pictures again."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        for file in shown():
            shutil.copyfile(Path(folder, file.name), file)
            print(f"{os.path.getsize(file):8,} {file.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
