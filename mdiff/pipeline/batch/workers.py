"""A pool of worker processes that make shards, and that may crash or hang.

A worker is a process of one thread with a model or codec of its own. The shard of one that
crashed goes to another worker. Where several crash at the same work item, the shard is made
without it or given up, so that a run always ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import torch

from mdiff.errors import MdiffError
from mdiff.pipeline.batch.jobs import Maker, Report, Shard

# So many workers may crash at a work item: one may be an accident, several are its doing.
ATTEMPTS = 3
# Seconds that a worker has to end after its pipe was closed.
GRACE = 10.0


@dataclass
class Worker:
    """A process, this end of its pipe, its shard, and the work item that it reported last.

    `heard` is the time of its last message or new shard, in seconds of the monotonic clock.
    """

    number: int
    process: SpawnProcess
    pipe: Connection
    heard: float
    shard: Shard | None = None
    item: Hashable = None


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: with more, the last bits of a product depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class WorkerPool:
    """Workers, the shards that wait for one, and the crashes so far.

    `done` is called with each shard that is complete; `timeout` is how many seconds a worker may
    be silent before it is killed, None for no limit.
    """

    def __init__(
        self, shards: Sequence[Shard], maker: Maker, *, done: Callable[[Shard], None],
        report: Report, timeout: float | None = None,
    ) -> None:  # fmt: skip
        self.waiting = deque(shards)
        self.maker, self.done, self.report, self.timeout = maker, done, report, timeout
        self.active: list[Worker] = []
        self.stopping: list[Worker] = []
        self.crashes = Counter[Hashable]()
        self.lost: list[str] = []

    def work(self, workers: int) -> None:
        """Make all shards with so many processes, none of which outlives the call.

        Raises MdiffError where a shard had to be given up (the others are made first) or no
        worker gets as far as a shard, and what a worker raised as soon as it does.
        """
        try:
            while self.waiting or any(worker.shard is not None for worker in self.active):
                self._start(workers)
                self._receive()
                self._kill_silent()
        finally:
            for worker in self.active:
                worker.process.terminate()
            for worker in self.active + self.stopping:
                _stop(worker)
        if self.lost:
            raise MdiffError(f"{'; '.join(self.lost[:3])}; the other shards are complete")

    def _start(self, workers: int) -> None:
        """Start the processes that are missing for the shards that wait."""
        coming = sum(worker.shard is None for worker in self.active)
        wanted = min(workers - len(self.active), len(self.waiting) - coming)
        free = sorted(set(range(workers)) - {worker.number for worker in self.active})
        self.active += [start_worker(self.maker, number) for number in free[: max(0, wanted)]]

    def _receive(self) -> None:
        """Wait for messages of workers, or for the timeout of one, and answer them."""
        rest = None
        if self.timeout is not None:
            longest = min(worker.heard for worker in self.active) + self.timeout
            rest = max(0.0, longest - time.monotonic())
        for pipe in wait([worker.pipe for worker in self.active], rest):
            worker = next(each for each in self.active if each.pipe is pipe)
            worker.heard = time.monotonic()
            try:
                received = worker.pipe.recv()
            except (EOFError, OSError):
                self._reap(worker)
                continue
            if isinstance(received, Exception):
                raise received
            if received is not None:
                worker.item = received
                continue
            if worker.shard is not None:
                self.done(worker.shard)
            else:
                self.crashes.pop(None, None)
            self._assign(worker)

    def _assign(self, worker: Worker) -> None:
        """Give a worker the next shard; without one left, it is stopped."""
        worker.shard, worker.item = None, None
        if not self.waiting:
            self.active.remove(worker)
            self.stopping.append(worker)
            worker.pipe.close()
            return
        worker.shard = self.waiting.popleft()
        # A crash is found when its pipe is read next.
        with suppress(OSError):
            worker.pipe.send(worker.shard.part())
        worker.heard = time.monotonic()

    def _kill_silent(self) -> None:
        if self.timeout is None:
            return
        for worker in list(self.active):
            silent = time.monotonic() - worker.heard
            if silent > self.timeout and not worker.pipe.poll():
                worker.process.kill()
                self._reap(worker, f"{self.timeout:g} s of silence")

    def _reap(self, worker: Worker, how: str = "") -> None:
        """Give a crashed worker's shard to the next one: all of it, without an item, or not."""
        self.active.remove(worker)
        worker.process.join()
        worker.pipe.close()
        how = how or _ending(worker.process.exitcode or 0)
        shard = worker.shard
        if shard is None:
            self.crashes[None] += 1
            if self.crashes[None] == ATTEMPTS:
                raise MdiffError(f"{ATTEMPTS} workers crashed before a shard, the last by {how}")
            return
        shard.clear()
        if shard.is_complete():
            self.done(shard)
            return
        self.crashes[shard.number, worker.item] += 1
        if self.crashes[shard.number, worker.item] < ATTEMPTS:
            self.waiting.appendleft(shard)
            return
        crashed = f"{ATTEMPTS} workers crashed at shard {shard.number}, the last by {how}"
        other = None if worker.item is None else shard.without(worker.item, how)
        if other is None:
            self.lost.append(crashed)
        else:
            self.report(f"{crashed}: it is retried without the work item of the crash")
            self.waiting.appendleft(other)


def _ending(code: int) -> str:
    """How a process ended."""
    if code == -signal.SIGKILL:
        return f"signal {-code} (the system kills so where memory runs out)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def start_worker(maker: Maker, number: int) -> Worker:
    """A new process, which asks for a shard when it is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, maker, number), daemon=True)
    process.start()
    # With the other end open here as well, a crash would not end the pipe.
    theirs.close()
    return Worker(number, process, ours, time.monotonic())


def _stop(worker: Worker) -> None:
    """End a worker without a shard by closing its pipe; it is killed after GRACE seconds."""
    worker.pipe.close()
    worker.process.join(GRACE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection, maker: Maker, number: int) -> None:
    """The main function of a worker process: shards as they come, until its pipe closes.

    It sends None to ask for a shard, each work item before it is made, and the error that ends
    it.
    """
    # An interrupt is for the parent to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        make = maker.open(number)
        pipe.send(None)
        while (part := _next(pipe)) is not None:
            make(part, pipe.send)
            pipe.send(None)
    except Exception as error:
        # The parent may have ended.
        with suppress(OSError):
            pipe.send(_portable(error))


def _next(pipe: Connection) -> object:
    """What is to be made next; None when the pipe has closed."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def leave_with_parent() -> None:
    """End this process when its parent has ended: another run may write its files by then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error as it can be sent to another process, still of a kind with its exit code."""
    if isinstance(error, MdiffError | MemoryError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return MemoryError(str(error))
    return MdiffError(f"{type(error).__name__}: {error}")
