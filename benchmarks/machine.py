"""What a benchmark ran on, and its results written beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from mdiff.evaluation.bench.timing import machine

RESULTS = Path(__file__).parent / "results"


def commit(root: Path = RESULTS.parent) -> str | None:
    """The commit of a tree, by default the one that runs, marked where it has changes."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True,
            cwd=root,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def record(name: str, figures: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json: the figures, the machine and the command."""
    RESULTS.mkdir(exist_ok=True)
    return write(RESULTS / f"{name}.json", figures)


def write(path: Path, figures: dict[str, Any]) -> Path:
    """Write a file of figures, with the machine, the commit and the command."""
    # Where somebody keeps the data is nobody's business.
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv]
    command = " ".join(["python", *words])
    document = {"figures": figures, "machine": machine(), "command": command, "commit": commit()}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}",
        file=sys.stderr,
    )
    return path
