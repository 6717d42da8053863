"""Running shards: each is made once, written atomically, and skipped where it is complete.

Shards that are complete are all the state there is. A shard consists of independent items, made by
an engine (see `engines`), and is written by this process when all of them are there. Nothing here
knows what a shard holds.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Generic, Protocol

from mdiff.errors import MdiffError
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.engines import (
    ATTEMPTS,
    Engine,
    Item,
    Maker,
    Raised,
    Result,
)
from mdiff.process_state import leave_with_launcher

Report = Callable[[str], None]


class Shard(Protocol[Item, Result]):
    """A unit of work that is written and counted as one; `str` names it in messages."""

    @property
    def number(self) -> int:
        """Its index among all shards, from 0."""

    @property
    def count(self) -> int:
        """How many items it has, at least 1."""

    def is_complete(self) -> bool:
        """Whether it is there; checked without reading all of it."""

    def clear(self) -> None:
        """Remove what killed writers left of it, and itself where it is damaged."""

    def item(self, number: int) -> Item:
        """An item, as data that can be pickled; asked for when it is to be made."""

    def split(self, item: Item) -> Sequence[Item]:
        """Smaller items with the same results, for one that crashed; none where there are none."""

    def failure(self, item: Item, how: str) -> Result | None:
        """The result that says that an item crashes its workers; None gives the shard up."""

    def write(self, results: Sequence[Result]) -> None:
        """Write it atomically, from the results of its items in their order."""


def make_all(
    shards: Sequence[Shard[Item, Result]], make: Callable[[Item], Result],
    maker: Maker[Item, Result], division: Division, *, report: Report = lambda line: None,
) -> int:  # fmt: skip
    """Make the shards of a share that are not complete; how many this call made.

    To be called by one process a share. Raises MdiffError where workers keep crashing, and what
    making an item raises; KeyboardInterrupt states what is complete.
    """
    leave_with_launcher()
    share = division.share.part(shards)
    for shard in share:
        shard.clear()
    left = [shard for shard in share if not shard.is_complete()]
    if len(left) < len(share):
        report(f"{len(share) - len(left)} of {len(share)} shards are there already")
    if not left:
        return 0
    engine = division.open(make, maker)
    try:
        Run(left, engine, timeout=division.timeout, report=report).work()
    except BaseException as error:
        engine.kill()
        if isinstance(error, KeyboardInterrupt):
            done = sum(shard.is_complete() for shard in shards)
            raise KeyboardInterrupt(
                f"interrupted: {done} of {len(shards)} shards are complete; "
                "the same command goes on"
            ) from None
        raise
    finally:
        engine.close()
    return len(left)


@dataclass(eq=False)
class Task(Generic[Item, Result]):
    """An item, and how often workers crashed at it alone.

    The keys of a shard's tasks are in the order of their results. A `suspect` was being made when
    a worker crashed; `due` is when it has taken too long, in seconds of the monotonic clock.
    """

    shard: Shard[Item, Result]
    key: tuple[int, ...]
    item: Item
    crashes: int = 0
    suspect: bool = False
    due: float = math.inf
    late: bool = False


class Run(Generic[Item, Result]):
    """Shards on their way through an engine.

    Where a crash ends several items, they are made again alone, one after the other, until the one
    is found that causes it; it may crash ATTEMPTS times. So the number of restarts is bounded.
    """

    def __init__(
        self, shards: Sequence[Shard[Item, Result]], engine: Engine[Item, Result], *,
        timeout: float | None = None, report: Report,
    ) -> None:  # fmt: skip
        self.engine, self.timeout, self.report = engine, timeout, report
        self.tasks = (
            Task(shard, (number,), shard.item(number))
            for shard in shards
            for number in range(shard.count)
        )
        self.suspects: deque[Task[Item, Result]] = deque()
        self.active: dict[Future[Result | Raised], Task[Item, Result]] = {}
        self.results: dict[int, dict[tuple[int, ...], Result]] = {s.number: {} for s in shards}
        self.missing = {shard.number: shard.count for shard in shards}
        self.lost: list[str] = []
        self.finished, self.total = 0, len(shards)
        # Most items at once since the last crash, and when: a worker may have started then.
        self.most, self.grown = 0, 0.0

    def work(self) -> None:
        """Make and write all shards.

        Raises MdiffError where one had to be given up, when the others are there, and at once
        what making an item raised.
        """
        while self._submit():
            self._receive()
        if self.lost:
            raise MdiffError(f"{'; '.join(self.lost[:3])}; the other shards are complete")

    def _submit(self) -> bool:
        """Give the engine what it has room for; whether any item is being made."""
        while len(self.active) < self._room():
            task = self.suspects.popleft() if self.suspects else next(self.tasks, None)
            if task is None:
                break
            now = time.monotonic()
            if len(self.active) == self.most:
                self.most, self.grown = self.most + 1, now
            if self.timeout is not None:
                # As long again for workers that load their model meanwhile.
                task.due = max(now, self.grown + self.timeout) + self.timeout
            self.active[self.engine.submit(task.item)] = task
        return bool(self.active)

    def _room(self) -> int:
        suspects = self.suspects or any(task.suspect for task in self.active.values())
        return 1 if suspects and self.engine.together else self.engine.workers

    def _receive(self) -> None:
        """Wait for items to be made, or for one to take too long."""
        due = min(task.due for task in self.active.values())
        rest = None if due == math.inf else max(0.0, due - time.monotonic())
        ready, _ = wait(self.active, rest, FIRST_COMPLETED)
        if not ready:
            for future, task in self.active.items():
                if task.due <= time.monotonic():
                    task.late, task.due = True, math.inf
                    self.engine.kill(future)
            return
        errors = (future.exception() for future in ready)
        crash = next((error for error in errors if isinstance(error, self.engine.crashes)), None)
        if crash is None:
            for future in ready:
                self._keep(self.active.pop(future), future.result())
            return
        how, self.most = self.engine.recover(crash), 0
        self._sort_out(set(self.active) if self.engine.together else ready, how)

    def _sort_out(self, ended: set[Future[Result | Raised]], how: str) -> None:
        """Keep what was made before a crash, and find the items to blame for it."""
        crashed = []
        for future in [each for each in self.active if each in ended]:
            task = self.active.pop(future)
            if isinstance(future.exception(), self.engine.crashes):
                crashed.append(task)
            else:
                self._keep(task, future.result())
        late = [task for task in crashed if task.late]
        alone = crashed if len(ended) == 1 or not self.engine.together else []
        for task in crashed:
            if task in (late or alone):
                self._blame(task, f"{self.timeout:g} s of silence" if task.late else how)
            else:
                task.suspect = True
                self.suspects.append(task)

    def _blame(self, task: Task[Item, Result], how: str) -> None:
        """Make a task again; or its parts, or without it, or give up its shard."""
        task.crashes, task.suspect, task.late = task.crashes + 1, True, False
        if task.crashes < ATTEMPTS:
            self.suspects.append(task)
            return
        shard = task.shard
        crashed = f"{ATTEMPTS} workers crashed at an item of {shard}, the last by {how}"
        parts = shard.split(task.item)
        failure = None if parts else shard.failure(task.item, how)
        if not parts and failure is None:
            self.lost.append(crashed)
            return
        if failure is not None:
            self.report(f"{crashed}: it is made without it")
            self._keep(task, failure)
            return
        self.report(f"{crashed}: it is made in parts")
        self.missing[shard.number] += len(parts) - 1
        for number, part in enumerate(parts):
            self.suspects.append(Task(shard, (*task.key, number), part, suspect=True))

    def _keep(self, task: Task[Item, Result], result: Result | Raised) -> None:
        """Keep a result; the last one of a shard completes it."""
        if isinstance(result, Raised):
            raise result.error
        number = task.shard.number
        self.results[number][task.key] = result
        self.missing[number] -= 1
        if self.missing[number]:
            return
        results = self.results.pop(number)
        task.shard.write([results[key] for key in sorted(results)])
        self.finished += 1
        self.report(f"{task.shard}: {self.finished} of {self.total}")
