"""How one load ended, its CPU seconds and its memory, within a limited address space."""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mdiff.errors import MdiffError

HEADROOM = 2 * 2**30
# A load that waits (for a pipe, say) is interrupted after so many ticks in which it did nothing,
# and one that computes after so many CPU seconds: neither depends on other processes.
TICK_SECONDS, IDLE_TICKS, IDLE_SHARE = 0.5, 8, 0.02
MOST_CPU_SECONDS = 4.0


class HangError(BaseException):
    """Not an Exception, so that nothing on the way takes it for an error of its own."""


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def limit_memory() -> None:
    """Limit the address space to what importing took and HEADROOM more."""
    limit = memory("VmSize") + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _watched() -> None:
    """Interrupt this process when it waits, or has computed, for too long."""
    began = last = time.process_time()
    idle = 0

    def tick(number: int, frame: Any) -> None:
        nonlocal idle, last
        now = time.process_time()
        idle += now - last < IDLE_SHARE * TICK_SECONDS
        last = now
        if idle >= IDLE_TICKS or now - began > MOST_CPU_SECONDS:
            raise HangError

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)


def measured(load: Callable[[], Any]) -> dict[str, Any]:
    """How the load `ended`, its CPU `seconds`, and the `bytes` by which resident memory peaked
    above where it began (VmHWM, reset through /proc/self/clear_refs).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.process_time()
    trace = None
    _watched()
    try:
        load()
        ended = "loaded"
    except MdiffError as error:
        ended = type(error).__name__
        if len(str(error).splitlines()) != 1:
            ended, trace = "an error of several lines", str(error)
    except BaseException as error:
        ended = f"undocumented {type(error).__name__}: {str(error)[:200]}"
        trace = traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, peak = time.process_time() - began, memory("VmHWM") - before
    return {"ended": ended, "seconds": seconds, "bytes": peak, "trace": trace}
