"""Generation at volume, the workers: processes that take whole shards, and may die.

A worker is a process of one thread with a model of its own. One that dies gives its shard back; a
shard at which several die is given up, so that a run always ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from mdiff.errors import MdiffError
from mdiff.offline_plan import Setting, Shard
from mdiff.offline_shards import make_shard, sweep_shard
from mdiff.pipeline import load

# So many workers may die at a shard: one is an accident, several are the shard's doing.
ATTEMPTS = 3
# Seconds that a worker has to end when it is told to.
GRACE = 10.0

# Told of each shard that is complete.
Done = Callable[[Shard], None]


@dataclass(frozen=True)
class Work:
    """What a worker is given once: which model, loaded how, and what to make where."""

    model: str
    dtype: str | None
    device: str | None
    mask_id: int | None
    setting: Setting
    out: Path


@dataclass
class Worker:
    """A process, this end of its pipe, and the shard that it has."""

    process: SpawnProcess
    pipe: Connection
    shard: Shard | None = None


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: with more, the last bits of a product depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def share(shards: Sequence[Shard], work: Work, *, workers: int, done: Done) -> None:
    """Make all shards with so many processes; `done` hears of each.

    Raises MdiffError where workers died at a shard ATTEMPTS times (the other shards are made
    first), and what a worker raised as soon as it does. No worker outlives the call.
    """
    waiting, deaths = deque(shards), Counter[int]()
    lost: list[str] = []
    team: list[Worker] = []
    started = 0
    try:
        while waiting or team:
            while waiting and len(team) < workers:
                team.append(_hired(work, started))
                started += 1
                _hand(team[-1], waiting)
            for pipe in wait([worker.pipe for worker in team]):
                worker = next(each for each in team if each.pipe is pipe)
                if not _answered(worker, done):
                    team.remove(worker)
                    _after_death(worker, work.out, waiting, deaths, lost)
                elif not _hand(worker, waiting):
                    team.remove(worker)
                    _dismiss(worker)
    finally:
        for worker in team:
            worker.process.terminate()
        for worker in team:
            _dismiss(worker)
    if lost:
        raise MdiffError(f"{'; '.join(lost[:3])}; the other shards are complete")


def _hired(work: Work, number: int) -> Worker:
    """A new process; of several GPUs each takes the next one."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    device, gpus = work.device, torch.cuda.device_count()
    if device is None and gpus > 1:
        device = f"cuda:{number % gpus}"
    process = context.Process(target=_serve, args=(theirs, work, device), daemon=True)
    process.start()
    # With the other end open here as well, a death would not be seen.
    theirs.close()
    return Worker(process, ours)


def _hand(worker: Worker, waiting: deque[Shard]) -> bool:
    """Give a worker the next shard; whether there is one."""
    worker.shard = waiting.popleft() if waiting else None
    if worker.shard is not None:
        try:
            worker.pipe.send(worker.shard)
        except OSError:
            # It has died: the next look at its pipe says so.
            return True
    return worker.shard is not None


def _answered(worker: Worker, done: Done) -> bool:
    """Take a worker's answer; False where it has died. Raises what it raised."""
    try:
        error = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    if error is not None:
        raise error
    if worker.shard is not None:
        done(worker.shard)
    return True


def _after_death(
    worker: Worker, out: Path, waiting: deque[Shard], deaths: Counter[int], lost: list[str]
) -> None:
    """Give a dead worker's shard to the next one, or give it up."""
    worker.process.join()
    worker.pipe.close()
    shard = worker.shard
    if shard is None:
        return
    sweep_shard(shard, out)
    deaths[shard.number] += 1
    if deaths[shard.number] < ATTEMPTS:
        waiting.appendleft(shard)
        return
    code = worker.process.exitcode or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    lost.append(
        f"{ATTEMPTS} workers died at shard {shard.number}, the last by {how} "
        "(the system kills so where memory runs out)"
    )


def _dismiss(worker: Worker) -> None:
    """End a worker that has no shard: its pipe closes, and it leaves."""
    worker.pipe.close()
    worker.process.join(GRACE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()


def _serve(pipe: Connection, work: Work, device: str | None) -> None:
    """What a worker process does: shards as they come, until its pipe closes."""
    # An interrupt is for the parent to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    pipeline = None
    while True:
        try:
            shard: Shard = pipe.recv()
        except EOFError:
            return
        answer = None
        try:
            if pipeline is None:
                pipeline = load(work.model, device=device, dtype=work.dtype, mask_id=work.mask_id)
            make_shard(pipeline, shard, work.setting, work.out)
        except Exception as error:
            answer = _portable(error)
        pipe.send(answer)


def _leave_with_parent() -> None:
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
