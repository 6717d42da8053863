"""Running a job: by the processes of this call, or by those of a launcher.

What is complete of an earlier run is kept. Each process of a launcher has the shards of its rank;
the first one makes what is left by those that have ended early.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import locked
from mdiff.pipeline.batch.jobs import Job, Report, Shard
from mdiff.pipeline.batch.workers import WorkerPool, one_thread

# Seconds between two polls of the files of other processes.
POLL_EVERY = 0.2

Item = TypeVar("Item")


@dataclass(frozen=True)
class Launched:
    """The rank of this process under a launcher such as torchrun or accelerate."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Launched:
        """From the environment; the only rank where it names none."""
        try:
            found = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError:
            raise ConfigError("RANK and WORLD_SIZE: expected whole numbers") from None
        if not 0 <= found.rank < found.world:
            raise ConfigError(f"RANK={found.rank}, WORLD_SIZE={found.world}: expected less of both")
        return found

    def device(self, device: str | None) -> str | None:
        """The device to load on: of several processes on a machine each has a GPU of its own."""
        gpus = torch.cuda.device_count()
        if device is not None or self.world == 1 or not gpus:
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % gpus}"

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items that this rank has: every `world`-th.

        >>> list(Launched(1, 3).share("abcdefgh"))
        ['b', 'e', 'h']
        """
        return items[self.rank :: self.world]

    @contextmanager
    def held(self, out: Path) -> Iterator[None]:
        """The right to write this rank's share in `out`.

        For the first rank, CheckpointError while another process has it; a later rank waits
        while the first makes its share.
        """
        with ExitStack() as stack:
            if self.rank == 0:
                stack.enter_context(locked(out))
            while self.rank and not _taken(stack, _lock_folder(out, self.rank)):
                time.sleep(POLL_EVERY)
            yield


def check_pool(workers: int, timeout: float | None, launched: Launched) -> None:
    """Raise ConfigError for an invalid number of workers or timeout."""
    if workers < 1 or (workers > 1 and launched.world > 1):
        raise ConfigError(
            f"workers={workers}: expected at least 1, and 1 in each process of a launcher"
        )
    if timeout is not None and not 0 < timeout < math.inf:
        raise ConfigError(f"timeout={timeout:g}: expected more than 0 seconds")


def make_all(
    job: Job, launched: Launched, *, workers: int = 1, timeout: float | None = None,
    report: Report = lambda line: None,
) -> int:  # fmt: skip
    """Make the shards of this rank that are not complete; how many this call made.

    To be called within `launched.held`. The first rank returns when every shard of the job is
    complete, a later one when its own are. One worker works in this process, except with a
    `timeout`, which needs a process that can be killed. Raises MdiffError where workers keep
    crashing, and what a shard's making raises; KeyboardInterrupt states what is complete.
    """
    try:
        made = _make(job, launched.share(job.shards), workers, timeout, report)
        for rank in range(1, launched.world if launched.rank == 0 else 1):
            made += _await(job, Launched(rank, launched.world), timeout, report)
    except KeyboardInterrupt:
        done = sum(shard.is_complete() for shard in job.shards)
        raise KeyboardInterrupt(
            f"interrupted: {done} of {len(job.shards)} shards are complete; "
            "the same command goes on"
        ) from None
    return made


def _make(
    job: Job, shards: Sequence[Shard], workers: int, timeout: float | None, report: Report
) -> int:
    """Make what is missing of these shards, here or with workers."""
    for shard in shards:
        shard.clear()
    left = [shard for shard in shards if not shard.is_complete()]
    if len(left) < len(shards):
        report(f"{len(shards) - len(left)} of {len(shards)} shards are there already")
    finished = 0

    def done(shard: Shard) -> None:
        nonlocal finished
        finished += 1
        report(f"{shard}: {finished} of {len(left)}")

    if timeout is not None or workers > 1:
        WorkerPool(left, job.maker, done=done, report=report, timeout=timeout).work(workers)
        return finished
    with one_thread():
        for shard in left:
            # Nobody watches this process: its work items are not reported.
            job.make(shard.part(), lambda item: None)
            done(shard)
    return finished


def _await(job: Job, other: Launched, timeout: float | None, report: Report) -> int:
    """Wait for another rank's shards; what it leaves when it ends early is made here."""
    made, shards = 0, other.share(job.shards)
    while shards := [shard for shard in shards if not shard.is_complete()]:
        with ExitStack() as stack:
            if _taken(stack, _lock_folder(job.out, other.rank)):
                made += _make(job, shards, 1, timeout, report)
        time.sleep(POLL_EVERY)
    return made


def _taken(stack: ExitStack, folder: Path) -> bool:
    """Whether the lock of a directory was free; it is held until the stack closes."""
    try:
        stack.enter_context(locked(folder))
    except CheckpointError:
        return False
    return True


def _lock_folder(out: Path, rank: int) -> Path:
    """The folder of a later rank's lock: a hidden one of its own."""
    return out / ".ranks" / str(rank)
