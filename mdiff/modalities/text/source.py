"""What the `data` sections of recipes have in common, whatever the medium."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from mdiff.files import STRICT, parse_settings

HUB = "hub:"
SPLITS = ("train", "validation", "holdout")

Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(config=STRICT, frozen=True)
class DataSource:
    """`source` is a path or a list of paths, of which ~ is the home, or "hub:OWNER/NAME".

    `subset` and `hub_split` name the part of a Hub data set. `holdout` is the fraction cut from
    the end; `validation` is the fraction cut from the end of what is left.
    """

    source: Annotated[
        str | Annotated[list[str], Field(min_length=1)],
        Field(description="a path or a list of paths"),
    ]
    subset: str | None = None
    hub_split: str = "train"
    holdout: Share = 0.1
    validation: Share = 0.0

    @classmethod
    def of(cls, options: Mapping[str, object] | DataSource | str | Path) -> Self:
        """From a mapping, or from a path with the defaults; ConfigError for invalid values."""
        if isinstance(options, cls):
            return options
        if isinstance(options, str | Path):
            return cls(source=str(options))
        given = {} if isinstance(options, DataSource) else options
        return parse_settings(cls, given, section="data")

    @property
    def paths(self) -> list[str]:
        """The sources as a list, ~ expanded."""
        listed = [self.source] if isinstance(self.source, str) else self.source
        return [os.path.expanduser(path) for path in listed]
