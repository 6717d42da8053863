"""The entries of a config.json that somebody else wrote, each checked as it is read."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from mdiff.errors import CheckpointError

Kind = TypeVar("Kind")
CONFIG = "config.json"
# More than any published model has, and little enough that a module of it is made at once.
MOST_LAYERS, MOST_WIDTH, MOST_IDS, MOST_EXPERTS = 256, 1 << 18, 1 << 24, 4096


class Fields:
    """The entries of a config.json, each checked as it is read; CheckpointError names it."""

    def __init__(self, described: Mapping[str, object], origin: str = CONFIG) -> None:
        self.described, self.origin = described, origin

    def whole(
        self, name: str, *, least: int = 1, most: int = MOST_WIDTH, default: int | None = None
    ) -> int:
        """A whole number in [least, most]; without a default it must be there."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= most:
            raise CheckpointError(
                f"{self.origin}: {name}={value!r}: expected a whole number, {least} to {most}"
            )
        return value

    def number(
        self, name: str, *, least: float = 0.0, most: float = 1e12, default: float | None = None
    ) -> float:
        """A finite number in [least, most]."""
        value = self._value(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not (least <= value <= most)
        ):
            raise CheckpointError(f"{self.origin}: {name}={value!r}: expected {least} to {most}")
        return float(value)

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.origin}: {name}={value!r}: expected true or false")
        return value

    def choice(self, name: str, known: Sequence[Kind], *, default: Kind | None = None) -> Kind:
        """One of the values that are supported here."""
        value = self._value(name, default)
        for one in known:
            if one == value:
                return one
        raise CheckpointError(
            f"{self.origin}: {name}={value!r} is not supported; known: "
            f"{', '.join(map(repr, known))}"
        )

    def optional_id(self, *named: str) -> int | None:
        """The id under the first of these names that is there and not null."""
        for name in named:
            if self.described.get(name) is not None:
                return self.whole(name, least=0, most=MOST_IDS)
        return None

    def _value(self, name: str, default: object) -> object:
        # null is how a config says that it leaves an entry to its default.
        value = self.described.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.origin}: {name} is missing")
        return value
