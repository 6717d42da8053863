"""A canvas of several parts: their names, where they lie, which ids they hold."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from mdiff.errors import ConfigError, nearest
from mdiff.tokens import TokenSpace


@dataclass(frozen=True)
class Part:
    """One run of a canvas: h rows of w places with `each` tokens a place, of `ids` ids."""

    name: str
    layout: tuple[int, int, int]
    ids: int

    @property
    def places(self) -> int:
        """How many tokens it has."""
        h, w, each = self.layout
        return h * w * each


@dataclass(frozen=True)
class CanvasParts:
    """Parts one after the other, in places and in ids; the mask is the id after the last.

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
        """The runs (h, w, tokens a place), for a backbone's positions."""
        return [part.layout for part in self.parts]

    @property
    def length(self) -> int:
        """Tokens of a canvas."""
        return sum(part.places for part in self.parts)

    @property
    def space(self) -> TokenSpace:
        """The ids of all parts; each part's own where there is more than one."""
        stops = list(accumulate(part.ids for part in self.parts))
        runs = tuple((part.places, stop - part.ids, stop) for part, stop in zip(self.parts, stops))
        return TokenSpace(stops[-1], mask_id=stops[-1], parts=runs if len(runs) > 1 else ())

    def span(self, name: str) -> slice:
        """The places of a part; ConfigError, with the nearest name, where there is none."""
        start = sum(part.places for part in self.parts[: self._index(name)])
        return slice(start, start + self.parts[self._index(name)].places)

    def ids(self, name: str) -> range:
        """The ids of a part."""
        first = sum(part.ids for part in self.parts[: self._index(name)])
        return range(first, first + self.parts[self._index(name)].ids)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ConfigError(f"this model has no {name}; {nearest(name, self.names)}")
        return self.names.index(name)
