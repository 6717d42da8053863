"""Work at volume: a job done by the processes of this call, or by those of a launcher.

What is whole of an earlier run is kept. Each process of a launcher has the shards of its rank;
the first one makes what is left by those that have died.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import locked
from mdiff.pipeline.batch.jobs import Job, Report, Shard
from mdiff.pipeline.batch.workers import Crew, one_thread

# Seconds between two looks at what other processes do.
LOOK_EVERY = 0.2

Item = TypeVar("Item")


@dataclass(frozen=True)
class Launched:
    """Which of a launcher's processes this is, as torchrun and accelerate say it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Launched:
        """As the environment says; the only one where it says nothing."""
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

        For the first rank, CheckpointError while another process has it; a later rank waits,
        until the first has made what it took for left behind.
        """
        with ExitStack() as stack:
            if self.rank == 0:
                stack.enter_context(locked(out))
            while self.rank and not _taken(stack, _room(out, self.rank)):
                time.sleep(LOOK_EVERY)
            yield


def check_crew(workers: int, patience: float | None, launched: Launched) -> None:
    """Raise ConfigError for a number of workers or a patience that cannot be meant."""
    if workers < 1 or (workers > 1 and launched.world > 1):
        raise ConfigError(
            f"workers={workers}: expected at least 1, and 1 in each process of a launcher"
        )
    if patience is not None and not 0 < patience < math.inf:
        raise ConfigError(f"patience={patience:g}: expected more than 0 seconds")


def make_all(
    job: Job, launched: Launched, *, workers: int = 1, patience: float | None = None,
    report: Report = lambda line: None,
) -> int:  # fmt: skip
    """Make what is not whole of this rank's shards; how many were made by this call.

    To be called within `launched.held`. The first rank returns when every shard of the job is
    whole, a later one when its own are. One worker works in this process, unless it is watched:
    with `patience` there is a process to kill. Raises MdiffError where workers keep dying, and
    what a shard's making raises; KeyboardInterrupt says what is complete.
    """
    try:
        made = _make(job, launched.share(job.shards), workers, patience, report)
        for rank in range(1, launched.world if launched.rank == 0 else 1):
            made += _await(job, Launched(rank, launched.world), patience, report)
    except KeyboardInterrupt:
        done = sum(shard.is_whole() for shard in job.shards)
        raise KeyboardInterrupt(
            f"interrupted: {done} of {len(job.shards)} shards are complete; "
            "the same command goes on"
        ) from None
    return made


def _make(
    job: Job, shards: Sequence[Shard], workers: int, patience: float | None, report: Report
) -> int:
    """Make what is missing of these shards, here or with workers."""
    for shard in shards:
        shard.clear()
    left = [shard for shard in shards if not shard.is_whole()]
    if len(left) < len(shards):
        report(f"{len(shards) - len(left)} of {len(shards)} shards are there already")
    finished = 0

    def done(shard: Shard) -> None:
        nonlocal finished
        finished += 1
        report(f"{shard}: {finished} of {len(left)}")

    if patience is not None or workers > 1:
        Crew(left, job.maker, done=done, report=report, patience=patience).work(workers)
        return finished
    with one_thread():
        for shard in left:
            job.make(shard.part(), _unheard)
            done(shard)
    return finished


def _unheard(place: Hashable) -> None:
    """Nobody watches over what is made in this process itself."""


def _await(job: Job, other: Launched, patience: float | None, report: Report) -> int:
    """Wait for another rank's shards; what it leaves behind when it dies is made here."""
    made, shards = 0, other.share(job.shards)
    while shards := [shard for shard in shards if not shard.is_whole()]:
        with ExitStack() as stack:
            if _taken(stack, _room(job.out, other.rank)):
                made += _make(job, shards, 1, patience, report)
        time.sleep(LOOK_EVERY)
    return made


def _taken(stack: ExitStack, room: Path) -> bool:
    """Whether the lock of a directory was free; it is held until the stack closes."""
    try:
        stack.enter_context(locked(room))
    except CheckpointError:
        return False
    return True


def _room(out: Path, rank: int) -> Path:
    """Where a later rank's lock lies: in a hidden folder of its own."""
    return out / ".ranks" / str(rank)
