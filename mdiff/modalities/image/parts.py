"""A canvas of several parts: their names, positions and ids."""

import math
from dataclasses import dataclass
from itertools import accumulate

from mdiff.errors import ConfigError, nearest
from mdiff.tokens import TokenSpace


@dataclass(frozen=True)
class Part:
    """A run of a canvas: `layout` (h, w, codes per position), each code one of `ids` ids."""

    name: str
    layout: tuple[int, int, int]
    ids: int

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return math.prod(self.layout)


@dataclass(frozen=True)
class CanvasParts:
    """Parts one after the other, in positions and in ids; the mask is the id after the last.

    >>> CanvasParts((Part("a", (2, 2, 1), 5), Part("b", (1, 1, 1), 3))).space.parts
    ((4, 0, 5), (1, 5, 8))
    """

    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names, in canvas order."""
        return tuple(part.name for part in self.parts)

    @property
    def layout(self) -> list[tuple[int, int, int]]:
        """The runs (h, w, codes per position), for a backbone's positions."""
        return [part.layout for part in self.parts]

    @property
    def length(self) -> int:
        """Tokens of a canvas."""
        return sum(part.length for part in self.parts)

    @property
    def space(self) -> TokenSpace:
        """The ids of all parts; each part's own where there is more than one."""
        stops = list(accumulate(part.ids for part in self.parts))
        runs = tuple((part.length, stop - part.ids, stop) for part, stop in zip(self.parts, stops))
        return TokenSpace(stops[-1], mask_id=stops[-1], parts=runs if len(runs) > 1 else ())

    def span(self, name: str) -> slice:
        """The positions of a part; ConfigError, with the nearest name, where there is none."""
        start = sum(part.length for part in self.parts[: self._index(name)])
        return slice(start, start + self.parts[self._index(name)].length)

    def ids(self, name: str) -> range:
        """The ids of a part."""
        first = sum(part.ids for part in self.parts[: self._index(name)])
        return range(first, first + self.parts[self._index(name)].ids)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(f"this model has no {name}; {nearest(name, self.names)}")
        return self.names.index(name)
