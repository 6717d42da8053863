"""The types of batch processing: a job, its shards, and what makes them.

`volume` and `workers` run a job whatever it makes: results of requests (`shards`), or tokens of
pictures (`encoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Report = Callable[[str], None]
# Called with each work item of a shard before it is made.
Heartbeat = Callable[[Hashable], None]
# Makes one shard from its `part` and writes it atomically; what it raises ends the run.
Make = Callable[[Any, Heartbeat], None]


class Shard(Protocol):
    """A unit of work that is made, written and counted as one; `str` names it in messages.

    Two makers of a shard write the same bytes, and write them atomically.
    """

    @property
    def number(self) -> int:
        """Its index in the job, from 0."""

    def is_complete(self) -> bool:
        """Whether it is there; checked without reading all of it."""

    def clear(self) -> None:
        """Remove what killed makers left of it, and itself where it is damaged.

        For the one process that is to make it and holds its lock.
        """

    def part(self) -> Any:
        """What a maker needs of this shard, as data that can be pickled."""

    def without(self, item: Hashable, how: str) -> Shard | None:
        """The same shard without a work item; None where the item cannot be left out.

        Several workers crashed at it, the last as `how` states. The number of calls that give a
        shard is bounded.
        """


class Maker(Protocol):
    """Opens a `Make` in another process; it is pickled and sent there once."""

    def open(self, worker: int) -> Make:
        """Load the model or the codec, in the worker of that number."""


@dataclass(frozen=True)
class Job:
    """Shards in the order of their numbers, and what makes them: here, and in workers.

    `out` is the folder whose lock gives the right to write.
    """

    shards: Sequence[Shard]
    make: Make
    maker: Maker
    out: Path
