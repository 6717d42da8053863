"""Work at volume, the workers: processes that take whole shards, and may die or hang.

A worker is a process of one thread with a model or codec of its own. One that dies gives its
shard back. Where several die at the same place of a shard it is made without that place, or
given up, so that a run always ends.
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

# So many workers may die at a place: one is an accident, several are the place's doing.
ATTEMPTS = 3
# Seconds that a worker has to end when it is told to.
GRACE = 10.0


@dataclass
class Worker:
    """A process, this end of its pipe, and what it has: a shard, and the place it told of last.

    `heard` is when it last had something to say or was given a shard, in seconds of the
    monotonic clock.
    """

    number: int
    process: SpawnProcess
    pipe: Connection
    heard: float
    shard: Shard | None = None
    place: Hashable = None


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: with more, the last bits of a product depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Crew:
    """Workers, the shards that wait for one, and what is known of deaths.

    `done` hears of each shard that is whole; `patience` is how many seconds a worker may be
    silent before it is killed, None for ever.
    """

    def __init__(
        self, shards: Sequence[Shard], maker: Maker, *, done: Callable[[Shard], None],
        report: Report, patience: float | None = None,
    ) -> None:  # fmt: skip
        self.waiting = deque(shards)
        self.maker, self.done, self.report, self.patience = maker, done, report, patience
        self.team: list[Worker] = []
        self.leaving: list[Worker] = []
        self.deaths = Counter[Hashable]()
        self.lost: list[str] = []

    def work(self, workers: int) -> None:
        """Make all shards with so many processes, none of which outlives the call.

        Raises MdiffError where a shard had to be given up (the others are made first) or no
        worker gets as far as a shard, and what a worker raised as soon as it does.
        """
        try:
            while self.waiting or any(worker.shard is not None for worker in self.team):
                self._hire(workers)
                self._listen()
                self._end_the_silent()
        finally:
            for worker in self.team:
                worker.process.terminate()
            for worker in self.team + self.leaving:
                _dismiss(worker)
        if self.lost:
            raise MdiffError(f"{'; '.join(self.lost[:3])}; the other shards are complete")

    def _hire(self, workers: int) -> None:
        """Start what processes are missing for the shards that wait."""
        coming = sum(worker.shard is None for worker in self.team)
        wanted = min(workers - len(self.team), len(self.waiting) - coming)
        free = sorted(set(range(workers)) - {worker.number for worker in self.team})
        self.team += [_hired(self.maker, number) for number in free[: max(0, wanted)]]

    def _listen(self) -> None:
        """Wait for words of workers, or for the end of patience with one, and answer them."""
        rest = None
        if self.patience is not None:
            longest = min(worker.heard for worker in self.team) + self.patience
            rest = max(0.0, longest - time.monotonic())
        for pipe in wait([worker.pipe for worker in self.team], rest):
            worker = next(each for each in self.team if each.pipe is pipe)
            worker.heard = time.monotonic()
            try:
                said = worker.pipe.recv()
            except (EOFError, OSError):
                self._bury(worker)
                continue
            if isinstance(said, Exception):
                raise said
            if said is not None:
                worker.place = said
                continue
            if worker.shard is not None:
                self.done(worker.shard)
            else:
                self.deaths.pop(None, None)
            self._hand(worker)

    def _hand(self, worker: Worker) -> None:
        """Give a worker the next shard; where there is none it leaves."""
        worker.shard, worker.place = None, None
        if not self.waiting:
            self.team.remove(worker)
            self.leaving.append(worker)
            worker.pipe.close()
            return
        worker.shard = self.waiting.popleft()
        # One that has died is seen by the next look at its pipe.
        with suppress(OSError):
            worker.pipe.send(worker.shard.part())
        worker.heard = time.monotonic()

    def _end_the_silent(self) -> None:
        if self.patience is None:
            return
        for worker in list(self.team):
            silent = time.monotonic() - worker.heard
            if silent > self.patience and not worker.pipe.poll():
                worker.process.kill()
                self._bury(worker, f"{self.patience:g} s of silence")

    def _bury(self, worker: Worker, how: str = "") -> None:
        """Give a dead worker's shard to the next one, whole, without a place, or not at all."""
        self.team.remove(worker)
        worker.process.join()
        worker.pipe.close()
        how = how or _ending(worker.process.exitcode or 0)
        shard = worker.shard
        if shard is None:
            self.deaths[None] += 1
            if self.deaths[None] == ATTEMPTS:
                raise MdiffError(f"{ATTEMPTS} workers died before they began, the last by {how}")
            return
        shard.clear()
        if shard.is_whole():
            self.done(shard)
            return
        self.deaths[shard.number, worker.place] += 1
        if self.deaths[shard.number, worker.place] < ATTEMPTS:
            self.waiting.appendleft(shard)
            return
        told = f"{ATTEMPTS} workers died at shard {shard.number}, the last by {how}"
        other = None if worker.place is None else shard.without(worker.place, how)
        if other is None:
            self.lost.append(told)
        else:
            self.report(f"{told}: it is tried without what they died at")
            self.waiting.appendleft(other)


def _ending(code: int) -> str:
    """How a process ended."""
    if code == -signal.SIGKILL:
        return f"signal {-code} (the system kills so where memory runs out)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _hired(maker: Maker, number: int) -> Worker:
    """A new process, which asks for a shard when it is ready."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, maker, number), daemon=True)
    process.start()
    # With the other end open here as well, a death would not be seen.
    theirs.close()
    return Worker(number, process, ours, time.monotonic())


def _dismiss(worker: Worker) -> None:
    """End a worker that has no shard: its pipe closes, and it leaves."""
    worker.pipe.close()
    worker.process.join(GRACE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection, maker: Maker, number: int) -> None:
    """What a worker process does: shards as they come, until its pipe closes.

    It says None when it wants a shard, the places that it comes to, and the error that ends it.
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
        # Where the parent is gone nobody wants to know.
        with suppress(OSError):
            pipe.send(_portable(error))


def _next(pipe: Connection) -> object:
    """What is to be made next; None when the pipe has closed."""
    try:
        return pipe.recv()
    except EOFError:
        return None


def leave_with_parent() -> None:
    """End this process when its parent has: what it would write is another run's by then."""
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
