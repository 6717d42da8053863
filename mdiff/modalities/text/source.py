"""What the `data` sections of recipes have in common, whatever the medium."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from mdiff.errors import ConfigError, nearest

HUB = "hub:"
SPLITS = ("train", "validation", "holdout")


@dataclass(frozen=True)
class DataSource:
    """`source` is a path or a list of paths, or "hub:OWNER/NAME".

    `subset` and `hub_split` name the part of a Hub data set. `holdout` is the fraction cut from
    the end; `validation` is the fraction cut from the end of what is left. Raises ConfigError for
    invalid values.
    """

    source: str | list[str]
    subset: str | None = None
    hub_split: str = "train"
    holdout: float = 0.1
    validation: float = 0.0

    def __post_init__(self) -> None:
        for name, share in (("holdout", self.holdout), ("validation", self.validation)):
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not 0 <= share < 1:
                raise ConfigError(f"data.{name}={share!r}: expected 0 or more and less than 1")
        paths = self.paths
        if not isinstance(paths, list) or not paths or not all(isinstance(p, str) for p in paths):
            raise ConfigError(f"data.source={self.source!r}: expected a path or a list of paths")

    @classmethod
    def of(cls, options: Mapping[str, object] | DataSource | str | Path) -> Self:
        """From a mapping, or from a path with the defaults; unknown keys are ConfigErrors."""
        if isinstance(options, cls):
            return options
        if isinstance(options, str | Path):
            return cls(source=str(options))
        given: dict[str, Any] = {} if isinstance(options, DataSource) else dict(options)
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                near = nearest(f"data.{key}", [f"data.{name}" for name in known])
                raise ConfigError(f"unknown key data.{key}; {near}")
        if "source" not in given:
            raise ConfigError("data.source is missing: expected a path, a list of them or hub:NAME")
        return cls(**given)

    @property
    def paths(self) -> list[str]:
        """The sources as a list."""
        return [self.source] if isinstance(self.source, str) else self.source
