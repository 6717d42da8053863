"""Who makes the shards of a job: which share of them, and by which engine."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mdiff.errors import ConfigError, nearest
from mdiff.pipeline.batch.engines import Engine, InProcess, Item, Maker, Pool, Result
from mdiff.pipeline.batch.ray_engine import RayEngine

ENGINES = ("local", "ray")
Element = TypeVar("Element")


@dataclass(frozen=True)
class Share:
    """The shards of one process of several that know nothing of each other: every `count`-th."""

    number: int = 1
    count: int = 1

    @classmethod
    def of(cls, written: str | None) -> Share:
        """That of --shard K/N; by default that of a launcher's environment, or all.

        >>> Share.of("3/8")
        Share(number=3, count=8)
        """
        name, text = "--shard ", written
        if text is None and "WORLD_SIZE" in os.environ:
            name, rank = "RANK + 1, WORLD_SIZE: ", os.environ.get("RANK", "0")
            text = f"{int(rank) + 1 if rank.isdecimal() else rank}/{os.environ['WORLD_SIZE']}"
        found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", "1/1" if text is None else text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"{name}{text}: expected K/N with K from 1 to N, such as 3/8")
        return cls(int(found[1]), int(found[2]))

    def part(self, elements: Sequence[Element]) -> Sequence[Element]:
        """The elements of this share.

        >>> list(Share(2, 3).part("abcdefgh"))
        ['b', 'e', 'h']
        """
        return elements[self.number - 1 :: self.count]

    @property
    def lock(self) -> str:
        """The name of the file that a process with this share locks."""
        return ".lock" if self.count == 1 else f".lock-{self.number}-of-{self.count}"


@dataclass(frozen=True)
class Division:
    """Who makes the shards: this share of them, by so many workers of an engine.

    `timeout` is how many seconds a worker may take to load its model and to make an item, None
    for no limit. ConfigError for values that do not go together.
    """

    workers: int | None = None
    timeout: float | None = None
    engine: str = "local"
    address: str | None = None
    share: Share = field(default_factory=Share)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers={self.workers}: expected at least 1")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ConfigError(f"timeout={self.timeout:g}: expected more than 0 seconds")
        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine!r}; {nearest(self.engine, ENGINES)}")
        if self.address is not None and self.engine != "ray":
            raise ConfigError(f"--address {self.address}: is for --engine ray")

    @property
    def in_process(self) -> bool:
        """Whether this process makes the items, which nothing can end but its own end."""
        return self.engine == "local" and (self.workers or 1) == 1 and self.timeout is None

    def open(
        self, make: Callable[[Item], Result], maker: Maker[Item, Result]
    ) -> Engine[Item, Result]:
        """The engine: `make` makes items here, what `maker` opens in another process."""
        if self.engine == "ray":
            return RayEngine(maker, self.workers, self.address)
        return InProcess(make) if self.in_process else Pool(maker, self.workers or 1)
