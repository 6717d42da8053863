"""Asynchronous checkpoints: one background thread writes while training goes on."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

# On Linux a thread of this niceness gets at most a fifteenth of a core that it shares.
NICE = 15


def _lower_priority() -> None:
    """Lower the priority of this thread: a step uses all cores, a save can wait."""
    # On other systems this would be the priority of the process.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class Writer:
    """Runs one job at a time in a background thread; as a context, its exit waits for the job.

    An exception of a job is raised by the next `begin` or `finish`, in the calling thread.
    `state` is what the job writes; the next save reuses its memory.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] | None = None
        self._pool = ThreadPoolExecutor(1, initializer=_lower_priority)
        self._job: Future[None] | None = None

    def begin(self, job: Callable[[], None]) -> None:
        """Start a job after the one before has ended; raises that one's exception."""
        self.finish()
        self._job = self._pool.submit(job)

    def finish(self) -> None:
        """Wait for the job, if there is one; raises its exception, once."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    @property
    def failed(self) -> bool:
        """Whether the job has ended with an exception that was not raised yet."""
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        while True:
            try:
                self._pool.shutdown(wait=True)
                break
            except KeyboardInterrupt:
                # The run's lock is released after this: no thread may write by then.
                continue
        if error is not None and self.failed:
            # That the last save failed is the more important error.
            self.finish()
