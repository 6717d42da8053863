"""The structure of the package, measured: sizes, imports, words, and how fast it starts.

    python benchmarks/structure.py [--fast] [--detail] [--json FILE] [--state before]

One table, a row a bound: the value before (where FILE holds one), the value now, and the bound.
The static part is that of tests/support/rooms.py and words.py, and reads the repository at
`--root`. `--fast` leaves out what starts processes. Times are medians over processes that take
turns with one that imports torch alone, which is subtracted. `--json` writes the figures into
FILE, by `--state` as those of before or of now, and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SUPPORT = ROOT / "tests" / "support"
sys.path.insert(0, str(SUPPORT))

import rooms  # noqa: E402
import words  # noqa: E402
from machine import commit, write  # noqa: E402

REPEATS = 5
ANSWERS = {
    "mdiff generate builtin:shakespeare --length 4": [
        "-m", "mdiff", "generate", "builtin:shakespeare", "--length", "4",
    ],
    'mdiff.load("builtin:emoji") in Python': ["-c", "import mdiff; mdiff.load('builtin:emoji')"],
}  # fmt: skip
# Models whose files are read, by the room in which a load of theirs ends.
READ = ("builtin:shakespeare", "builtin:emoji", "tests/golden/llada", "tests/golden/mdlm")
IMPORTED = """
import sys, time
{before}
start = time.perf_counter()
{line}
print(time.perf_counter() - start)
print(*sorted(name for name in {heavy} if name in sys.modules))
"""
HEAVY = ("torch", "transformers", "datasets", "accelerate", "triton", "PIL", "mdiff.pipeline",
         "mdiff.files", "mdiff.modalities", "mdiff.backbones")  # fmt: skip
READS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {support!r})
from file_reads import counted_parses
import mdiff
name = {name!r}
inside = Path(mdiff.__file__).parent / "builtin" / name.removeprefix("builtin:")
folder = inside if name.startswith("builtin:") else Path(name)
with counted_parses(folder) as counts:
    mdiff.load(name)
print(json.dumps(counts))
"""


@dataclass(frozen=True)
class Figure:
    """A row: `value` is None where it was not measured, `most` None where there is no bound."""

    what: str
    value: float | None
    most: float | None
    detail: Any = None

    @property
    def met(self) -> bool | None:
        """Whether the value is within its bound."""
        if self.value is None or self.most is None:
            return None
        return self.value <= self.most


def static(root: Path) -> list[Figure]:
    """What the source of a repository shows."""
    package = rooms.Package(root)
    entries = package.entries()
    inner = {name: n for name, n in entries.items() if name != "." and name not in rooms.OF_PARTS}
    # An older layout has rooms that no floor is given for.
    floored = {source.room for source in package.sources} <= {"__main__", "builtin"}.union(
        *rooms.FLOORS
    )
    upwards = rooms.wrong_arrows(package.arrows) if floored else None
    circles = rooms.circles(package.arrows)
    probes = package.count(r"\b(?:getattr|hasattr)\(")
    anys = package.count(r"\bAny\b", imports=False)
    ignores = package.count(r"type: ignore")
    files, functions = package.long_files(), package.long_functions()
    files.pop("kernels/onepass.c", None)
    wide = package.wide_functions()
    found = [
        Figure("entries at the top of mdiff/", entries["."], rooms.MOST_AT_THE_TOP),
        Figure("entries of the fullest folder", max(inner.values()), rooms.MOST_IN_A_FOLDER, inner),
        Figure("imports upwards", None if upwards is None else len(upwards), 0, upwards),
        Figure("circles among files", len(circles), 0, circles),
        Figure("getattr( and hasattr(", sum(probes.values()), 40, probes),
        Figure("the word Any outside import lines", sum(anys.values()), 220, anys),
        Figure("type: ignore", sum(ignores.values()), 25, ignores),
        Figure("files over 300 lines, onepass.c aside", len(files), 0, files),
        Figure("functions over 50 lines", len(functions), 0, functions),
        Figure("functions over 12 arguments", len(wide), 0, wide),
        Figure("lines of Python", package.lines(), 27_000),
    ]
    for word in [*words.WORDS, *words.NAMES]:
        hits = words.every_hit(root, word)
        by_file = {path: sum(hit.path == path for hit in hits) for path in {h.path for h in hits}}
        found.append(Figure(f"word: {word}", len(hits), 0, dict(sorted(by_file.items()))))
    return found


def running(root: Path) -> list[Figure]:
    """What only a running program shows: what is read, imported, and how long it takes."""
    found = []
    for name in READ:
        counts = json.loads(_python(root, "-c", READS.format(support=str(SUPPORT), name=name)))
        most = max(counts.values())
        found.append(Figure(f"reads of a config or header, load {name}", most, 1, counts))
    for line, before, most in (
        ("import mdiff", "", 0.3),
        ("from mdiff import sample", "import torch", 0.3),
    ):
        after = " after torch" if before else ""
        code = IMPORTED.format(before=before, line=line, heavy=HEAVY)
        runs = [_python(root, "-c", code).splitlines() for _ in range(REPEATS)]
        seconds = statistics.median(float(run[0]) for run in runs)
        found.append(Figure(f"{line}{after}, seconds", seconds, most))
        allowed = {"torch", "triton"} if before else set()
        heavy = set("".join(runs[0][1:]).split()) - allowed
        found.append(Figure(f"{line}: heavy modules", len(heavy), 0, sorted(heavy)))
    return found + answers(root)


def answers(root: Path) -> list[Figure]:
    """Seconds of whole processes above one that imports torch alone, the three in turns."""
    tasks = {"import torch": ["-c", "import torch"], **ANSWERS}
    for task in tasks.values():
        _python(root, *task)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in tasks}
    for _ in range(REPEATS):
        for name, task in tasks.items():
            taken[name].append(_seconds(lambda task=task: _python(root, *task)))
    found = []
    for clock in ("wall", "processor"):
        torch = [run[clock] for run in taken["import torch"]]
        found.append(Figure(f"import torch, {clock} seconds", statistics.median(torch), None))
        for name in ANSWERS:
            above = [run[clock] - least for run, least in zip(taken[name], torch, strict=True)]
            found.append(Figure(f"{name}, {clock} seconds above", statistics.median(above), 1.0))
    return found


def _seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of wall time, and of processor time of the processes that `run` waited for."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"wall": wall, "processor": processor}


def _python(root: Path, *arguments: str) -> str:
    """What a Python process of its own prints, with the package of `root`."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=root, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ).stdout  # fmt: skip


def shown(value: float | None) -> str:
    """A figure as it stands in the table."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else f"{value:,}"


def table(figures: list[Figure], before: dict[str, float | None], *, detail: bool) -> None:
    """Print the figures, a row each; `no` stands at those that miss their bound."""
    width = max(len(figure.what) for figure in figures)
    print(f"{'what':{width}} {'before':>8} {'now':>8} {'at most':>8}")
    for figure in figures:
        values = (before.get(figure.what), figure.value, figure.most)
        columns = " ".join(f"{shown(value):>8}" for value in values)
        print(f"{figure.what:{width}} {columns}{'  no' if figure.met is False else ''}")
        if detail and figure.detail:
            print(f"    {figure.detail}")


def main() -> None:
    """Measure, print the table, and write the figures where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--detail", action="store_true", help="what each figure is made of")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--state", choices=["before", "now"], default="now")
    options = parser.parse_args()
    root, file = options.root.resolve(), options.json
    figures = static(root) + ([] if options.fast else running(root))
    known = json.loads(file.read_text())["figures"] if file and file.exists() else {}
    old = known.get("before", {"rows": ()})["rows"]
    before = {row["what"]: row["value"] for row in old}
    table(figures, before, detail=options.detail)
    if file:
        state = {"commit": commit(root), "rows": [asdict(figure) for figure in figures]}
        write(file, known | {options.state: state})


if __name__ == "__main__":
    main()
