"""From a part's name to the object of that name in its room; no registry, no decorator."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from mdiff.errors import ConfigError, nearest


def names(room: str) -> list[str]:
    """The parts in a room of the package, sorted.

    >>> "first_hitting" in names("samplers")
    True
    """
    package = import_module(f"mdiff.{room}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(room: str, name: str) -> Any:
    """The object called `name` in module `mdiff.ROOM.name`; hyphens and underscores alike.

    `pkg.mod:name` is the object `name` of any importable module. ConfigError names the
    nearest part where there is none.

    >>> find("samplers", "first-hitting").__name__
    'first_hitting'
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{name!r} cannot be imported: {error}") from error
    part = name.replace("-", "_")
    known = names(room)
    if part not in known:
        kind = room.removesuffix("s")
        raise ConfigError(f"unknown {kind} {name!r}; {nearest(part, known)}")
    return getattr(import_module(f"mdiff.{room}.{part}"), part)
