"""A child process that loads mutated files: `python batch.py FIRST STOP PROGRESS WORK`.

For each trial it prints a JSON line: how it ended, its CPU seconds, and by how many bytes its
resident memory peaked above where it began (VmHWM, reset through /proc/self/clear_refs).
The address space is limited to what importing took and 2 GiB more.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import corpus  # noqa: E402

from mdiff.errors import MdiffError  # noqa: E402

HEADROOM = 2 * 2**30
# A trial that waits (for a pipe, say) is told so after so many ticks: a process that was merely
# stopped for a while gets one tick for all of them.
TICK_SECONDS, TICKS = 0.5, 8


class HangError(BaseException):
    """Not an Exception, so that nothing on the way takes it for an error of its own."""


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def watched() -> None:
    """Interrupt this trial when it has had its ticks."""
    ticks = 0

    def tick(number: int, frame: Any) -> None:
        nonlocal ticks
        ticks += 1
        if ticks >= TICKS:
            raise HangError

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)


def trial(number: int, seeds: Path, work: Path) -> dict[str, Any]:
    """Load one mutated copy; how that ended."""
    kind = corpus.kind_of(number)
    source, folder = seeds / kind, work / kind
    if not source.exists():
        source.mkdir(parents=True)
        corpus.CASES[kind][0](source)
        corpus.CASES[kind][1](source)
    # The files are shared until one is replaced.
    shutil.copytree(source, folder, copy_function=os.link)
    corpus.harm(folder, number)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.process_time()
    trace = None
    watched()
    try:
        corpus.CASES[kind][1](folder)
        ended = "loaded"
    except MdiffError as error:
        ended = type(error).__name__
        if "\n" in str(error):
            ended, trace = "an error of several lines", str(error)
    except BaseException as error:
        ended = f"undocumented {type(error).__name__}: {str(error)[:200]}"
        trace = traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, peak = time.process_time() - began, memory("VmHWM") - before
    shutil.rmtree(work)
    return {"number": number, "kind": kind, "ended": ended, "seconds": seconds, "bytes": peak,
            "trace": trace}  # fmt: skip


def main(first: int, stop: int, progress: Path, work: Path) -> None:
    """All trials from `first` to before `stop`."""
    warnings.simplefilter("ignore")
    limit = memory("VmSize") + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with progress.open("w") as file:
        for number in range(first, stop):
            # What a crash leaves here is the number of the trial that crashed.
            print(json.dumps({"number": number}), file=file, flush=True)
            print(json.dumps(trial(number, work / "valid", work / "trial")), file=file, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
