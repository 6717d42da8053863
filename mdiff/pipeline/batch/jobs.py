"""Work at volume, its nouns: shards that are whole or not there, and what makes them.

`volume` and `workers` do a job without knowing what it makes: results of requests
(`offline_shards`), tokens of pictures (`shard_writing`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Report = Callable[[str], None]
# Told of a place in a shard before its making goes on from there.
Tell = Callable[[Hashable], None]
# Makes one shard, whole, of its `part`; what it raises ends the run.
Make = Callable[[Any, Tell], None]


class Shard(Protocol):
    """What is made, written and counted as one; `str` of it is its name in messages.

    Two makers of a shard leave the same bytes. One that is killed at any moment leaves it whole
    or not there.
    """

    @property
    def number(self) -> int:
        """Its place in the job, from 0."""

    def is_whole(self) -> bool:
        """Whether it is there; a look, without reading all of it."""

    def clear(self) -> None:
        """Remove what killed makers left of it, and itself where it is damaged.

        For the one process that is to make it, with its lock in hand.
        """

    def part(self) -> Any:
        """What a maker needs of this shard: plain data that a pipe takes."""

    def without(self, place: Hashable, how: str) -> Shard | None:
        """The same shard for makers that keep clear of a place; None where there is no such.

        Several makers died there, the last as `how` says. Only so many calls may give a shard.
        """


class Maker(Protocol):
    """How another process comes by a `Make`; it is sent there once, as plain data."""

    def open(self, worker: int) -> Make:
        """Load the model or the codec, in the worker of that number."""


@dataclass(frozen=True)
class Job:
    """Shards in the order of their numbers, and what makes them: here, and in workers.

    `out` is the folder whose lock says who may write.
    """

    shards: Sequence[Shard]
    make: Make
    maker: Maker
    out: Path
