"""Which backbone a published config.json is for, and the model that the files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mdiff.errors import CheckpointError
from mdiff.files import read_json
from mdiff.find import find, names
from mdiff.locate import check_weights
from mdiff.published import CONFIG_FILE, Published
from mdiff.weights import load_weights


def recognised(folder: Path) -> str | None:
    """The name of the backbone whose config.json this is; None where no file claims it.

    By the architecture that the config names; by its keys only where it names none.
    """
    described = read_json(folder / CONFIG_FILE)
    named = described.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{folder / CONFIG_FILE}: architectures: expected a list of names")
    for room in names("backbones"):
        module = _file_of(room)
        if set(named) & set(getattr(module, "ARCHITECTURES", ())):
            return room
    if not named:
        for room in names("backbones"):
            claims: Callable[[Mapping[str, Any]], bool] | None
            claims = getattr(_file_of(room), "recognises", None)
            if claims is not None and claims(described):
                return room
    return None


def supported() -> list[str]:
    """The architectures of other projects that have a file here."""
    return sorted(
        name for room in names("backbones") for name in getattr(_file_of(room), "ARCHITECTURES", ())
    )


def load_published(
    folder: Path,
    room: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | Mapping[str, Any] | str = "cpu",
    root: Path | None = None,
) -> Published:
    """The model in `folder`, whose backbone is `room`, with its weights on `device`.

    Links may lead anywhere in `root`, by default the cache that a snapshot of the Hub lies in:
    `locate` has checked where they lead.
    """
    module = built(room, read_json(folder / CONFIG_FILE))
    paths = check_weights(folder, root=root or folder.parent.parent)
    stored = load_weights(
        module, paths, dtype=dtype, device=device, tied=module.tied
    )  # fmt: skip
    module.stored = frozenset(stored)
    return module


def _file_of(room: str) -> Any:
    return import_module(f"mdiff.backbones.{room}")


def built(room: str, described: Mapping[str, Any]) -> Published:
    """The module of a config, without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        module: Published = find("backbones", room)(described)
    return module
