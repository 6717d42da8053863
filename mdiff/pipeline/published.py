"""Which backbone a published config.json is for, and the model that the files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mdiff.backbones.layers import Backbone
from mdiff.errors import CheckpointError, nearest
from mdiff.files import CONFIG_FILE, check_weights, load_weights, read_json
from mdiff.find import find, module_of, names

# What AutoModelForMaskedLM takes, whatever comes before it.
MASKED_LM = "ForMaskedLM"
ANY = f"any ...{MASKED_LM}"


def recognised(folder: Path) -> str | None:
    """The name of the backbone whose config.json this is; None where no file claims it.

    By the architecture that the config names; by its keys only where it names none.
    """
    return claimed(read_json(folder / CONFIG_FILE), origin=str(folder / CONFIG_FILE))


def claimed(described: Mapping[str, Any], *, origin: str = CONFIG_FILE) -> str | None:
    """The name of the backbone that claims a config; see `recognised`."""
    named = described.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{origin}: architectures: expected a list of names")
    for room in names("backbones"):
        module = module_of("backbones", room)
        if set(named) & set(getattr(module, "ARCHITECTURES", ())):
            return room
    if not named:
        for room in names("backbones"):
            claims: Callable[[Mapping[str, Any]], bool] | None
            claims = getattr(module_of("backbones", room), "recognises", None)
            if claims is not None and claims(described):
                return room
    return None


def is_published(room: str) -> bool:
    """Whether a backbone of this name is of another project's layout; ConfigError for no name."""
    find("backbones", room)
    return room.replace("-", "_") in published_backbones()


def published_backbones() -> dict[str, str | None]:
    """The backbones of other projects, each with the first of its architectures.

    None where published configs name none, and their keys say whose they are.
    """
    files = {room: module_of("backbones", room) for room in names("backbones")}
    return {
        room: next(iter(getattr(module, "ARCHITECTURES", ())), None)
        for room, module in files.items()
        if hasattr(module, "ARCHITECTURES") or hasattr(module, "recognises")
    }


def supported() -> list[str]:
    """The architectures of other projects that have a file here."""
    return sorted(
        name
        for room in names("backbones")
        for name in getattr(module_of("backbones", room), "ARCHITECTURES", ())
    )


def unsupported(folder: Path) -> CheckpointError | None:
    """Why no backbone opens a model that none recognises; None for a masked LM of transformers."""
    described = read_json(folder / CONFIG_FILE)
    named = [" ".join(str(name)[:80].split()) for name in described.get("architectures") or []]
    if not named:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

        kind = str(described.get("model_type"))[:80]
        if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return None
        kind = " ".join(kind.split())
        return CheckpointError(
            f"{folder} names no architecture (model_type {kind}): not supported; "
            f"known: {', '.join([*supported(), ANY])}"
        )
    other = next((name for name in named if not name.endswith(MASKED_LM)), None)
    if other is None:
        return None
    known = nearest(other, [*supported(), ANY])
    return CheckpointError(f"{folder} is a {other}, which is not supported; {known}")


def load_published(
    folder: Path,
    room: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | Mapping[str, Any] | str = "cpu",
    root: Path | None = None,
) -> Backbone:
    """The model in `folder`, whose backbone is `room`, with its weights on `device`.

    Links may lead anywhere in `root`, by default the cache that a snapshot of the Hub lies in.
    """
    module = built(room, read_json(folder / CONFIG_FILE))
    return filled(module, folder, dtype=dtype, device=device, root=root)


def filled(
    module: Backbone,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | Mapping[str, Any] | str = "cpu",
    root: Path | None = None,
) -> Backbone:
    """The module from `built` with the weights in `folder`; see `load_weights`."""
    paths = check_weights(folder, root=root)
    stored = load_weights(
        module, paths, dtype=dtype, device=device, tied=module.tied
    )  # fmt: skip
    module.stored = frozenset(stored)
    return module


def built(room: str, described: Mapping[str, Any]) -> Backbone:
    """The module of a config, without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        module: Backbone = find("backbones", room)(described)
    return module
