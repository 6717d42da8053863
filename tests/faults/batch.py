"""A child process that loads mutated files: `python batch.py FIRST STOP PROGRESS WORK`.

For each trial it writes a JSON line to PROGRESS: its number, its kind and how it was `measured`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

import corpus  # noqa: E402
from measured import limit_memory, measured  # noqa: E402


def valid(kind: str, seeds: Path) -> Path:
    """The folder of valid files of a kind, made and loaded once."""
    folder = seeds / kind
    if not folder.exists():
        folder.mkdir(parents=True)
        make, load, _ = corpus.CASES[kind]
        make(folder)
        load(folder)
    return folder


def trial(number: int, seeds: Path, work: Path) -> dict[str, Any]:
    """Load one mutated copy; how that ended."""
    kind = corpus.kind_of(number)
    folder = work / kind
    # The files are shared until one is replaced.
    shutil.copytree(valid(kind, seeds), folder, copy_function=os.link)
    corpus.harm(folder, number)
    found = measured(lambda: corpus.CASES[kind][1](folder))
    shutil.rmtree(work)
    return {"number": number, "kind": kind, **found}


def main(first: int, stop: int, progress: Path, work: Path) -> None:
    """All trials from `first` to before `stop`."""
    warnings.simplefilter("ignore")
    limit_memory()
    with progress.open("w") as file:
        for number in range(first, stop):
            # What a crash leaves here is the number of the trial that crashed.
            print(json.dumps({"number": number}), file=file, flush=True)
            print(json.dumps(trial(number, work / "valid", work / "trial")), file=file, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
