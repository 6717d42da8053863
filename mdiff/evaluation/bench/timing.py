"""The machine, two sides timed in turns in one process, and the row of the result."""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from mdiff import __version__

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def machine() -> dict[str, object]:
    """Processor, threads, GPU and versions."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name.*?:(.*)", info.read_text() if info.exists() else "", re.M)
    return {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mdiff": __version__,
    }


def last_cache_bytes(caches: Path = CACHES) -> int | None:
    """The bytes of the largest cache that the first core reads through; None where unknown."""
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    known = [int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS]
    return max(known, default=None)


@dataclass(frozen=True)
class Size:
    """The sizes of the measured cases; the targets are stated for the defaults.

    `rows` N of the draw and of the loss, half of them hidden; `vocab` V throughout, and `small`
    the other one of the draw, with `small_rows`; `repeats` of the draw, `loss_repeats` of the
    loss. The generation has `length` L, `depth` layers and `steps` steps in the baselines, of
    which `timed` are run unless `full`.
    """

    rows: int = 1024
    vocab: int = 50_257
    small: int = 4096
    small_rows: int = 1024
    repeats: int = 3
    loss_repeats: int = 3
    length: int = 256
    width: int = 256
    depth: int = 12
    steps: int = 1000
    timed: int = 20
    full: bool = False


# The clocks of a step of the toolkit: processor time of the thread, and wall time.
CLOCKS: Mapping[str, Callable[[], float]] = {"thread": time.thread_time, "clock": time.perf_counter}

# About 5 ms of a GPU, longer than Python takes to launch the timed kernels.
BUSY_CYCLES = 10_000_000

DEFAULT = Size()
FULL = Size(full=True)
QUICK = Size(rows=64, small_rows=512, repeats=2, loss_repeats=1, length=32, timed=4)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    `figure` is of the minima over the repeats (of a generation, of the whole) and `median` of
    the medians, in `unit`: "x" is the other's time (or memory) over ours, "%" a share, "" a
    plain number. `figure` None says that nothing was measured, and `note` why. `target` None is
    a figure without one. `detail` holds both sides: seconds of each repeat, rows.
    """

    section: str
    what: str
    figure: float | None = None
    median: float | None = None
    unit: str = "x"
    target: float | None = None
    at_least: bool = True
    per_row: float | None = None
    note: str = ""
    detail: Mapping[str, object] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether `figure` reaches its target; None where one of them is missing."""
        if self.figure is None or self.target is None:
            return None
        return self.figure >= self.target if self.at_least else self.figure <= self.target

    def as_json(self) -> dict[str, object]:
        """All fields, and `met`."""
        return {**asdict(self), "met": self.met}


def cpu_seconds(run: Callable[[], object]) -> float:
    """Processor time of this process during a call: waiting for other processes is not counted."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def cuda_seconds(run: Callable[[], object]) -> float:
    """Time of a call on the current CUDA device, between two events.

    The device is kept busy until the call is queued, so that this is the time of the kernels and
    not of launching them, unless the call itself synchronises with the device.
    """
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


def interleaved(
    tasks: Mapping[str, Callable[[], object]], *, repeats: int,
    seconds: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of each task's repeats: all once to warm up, then `repeats` rounds of all in turn."""
    for task in tasks.values():
        task()
    rounds = [{name: seconds(task) for name, task in tasks.items()} for _ in range(repeats)]
    return {name: [each[name] for each in rounds] for name in tasks}


def ratios(over: Sequence[float], under: Sequence[float], scale: float = 1) -> tuple[float, float]:
    """`scale` times the ratio of two sides' minima, and times that of their medians."""
    return scale * min(over) / min(under), scale * median(over) / median(under)


def times_faster(
    section: str, what: str, ours: Sequence[float], other: Sequence[float], *,
    rows: tuple[int, int], target: float | None = None, note: str = "", **detail: object,
) -> Row:  # fmt: skip
    """The row of how many times faster `ours` is; `rows` are the rows that each side worked on."""
    figure, middle = ratios(other, ours)
    sides = {"mdiff": (ours, rows[0]), "other": (other, rows[1])}
    found = {name: {"seconds": seconds, "rows": count} for name, (seconds, count) in sides.items()}
    return Row(
        section, what, figure, middle, target=target, per_row=figure * rows[0] / rows[1],
        note=note, detail={**found, **detail},
    )  # fmt: skip
