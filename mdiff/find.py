"""From a part's name to the object of that name in its room; no registry, no decorator."""

import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

from mdiff.errors import ConfigError, nearest

# The folders of a room, where they are not the one folder of its name.
FOLDERS = {
    "backbones": ("backbones", "backbones.published"),
    "codecs": ("modalities.image.codecs",),
}
# Here a part of several files is a folder; in other rooms folders hold what parts share.
OF_FOLDERS = ("modalities",)
# The contract of a room's parts lies beside them.
CONTRACT = "protocol"


def names(room: str) -> list[str]:
    """The parts in a room of the package, sorted.

    >>> "first_hitting" in names("samplers")
    True
    """
    return sorted(_modules(room))


def module_of(room: str, name: str) -> ModuleType:
    """The module of a part; hyphens and underscores alike. ConfigError names the nearest part."""
    part, known = name.replace("-", "_"), _modules(room)
    if part not in known:
        raise ConfigError(f"unknown {room.removesuffix('s')} {name!r}; {nearest(part, known)}")
    return import_module(known[part])


def find(room: str, name: str) -> Any:
    """The object called `name` in the module of that name in a room.

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
    return getattr(module_of(room, name), name.replace("-", "_"))


def _modules(room: str) -> dict[str, str]:
    """The parts of a room and the dotted names of their modules."""
    found = {}
    for folder in FOLDERS.get(room, (room,)):
        package = import_module(f"mdiff.{folder}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            name = module.name.rpartition(".")[2]
            if name != CONTRACT and (not module.ispkg or room in OF_FOLDERS):
                found[name] = module.name
    return found
