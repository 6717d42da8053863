"""Checkpoints are written beside the training that goes on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor

# What Linux takes from a thread that is this nice: a fifteenth or less of a core that it shares.
NICE = 15


def _give_way() -> None:
    """Let this thread have what the others leave: a step takes all cores, a save can wait."""
    # Elsewhere than on Linux it would be the process that gives way.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Writer:
    """Does one job at a time in a thread of its own; leaving it as a context waits for the job.

    What a job raised is raised by the next `begin` or `finish`, in the thread that calls it.
    `state` is what the job writes, kept for its memory.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] | None = None
        self._pool = ThreadPoolExecutor(1, initializer=_give_way)
        self._job: Future[None] | None = None

    def begin(self, job: Callable[[], None]) -> None:
        """Start a job, once the one before has ended well."""
        self.finish()
        self._job = self._pool.submit(job)

    def finish(self) -> None:
        """Wait for the job, if there is one; raises what it raised, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    @property
    def failed(self) -> bool:
        """Whether the job has ended with an error that nobody has been told of."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while True:
            try:
                self._pool.shutdown(wait=True)
                break
            except KeyboardInterrupt:
                # The lock of the run is let go of after this: nothing may write by then.
                continue
        if error is not None and self.failed:
            # Whatever ended the steps: that the last save is not there is what has to be said.
            self.finish()
