"""Which backbone a published config.json is for, and the model that the files hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mdiff.backbones.layers import Backbone
from mdiff.errors import CheckpointError, nearest
from mdiff.files import CONFIG, ModelFiles, load_weights
from mdiff.find import find, module_of, names

# What AutoModelForMaskedLM takes, whatever comes before it.
MASKED_LM = "ForMaskedLM"
ANY = f"any ...{MASKED_LM}"


def recognised(files: ModelFiles) -> str | None:
    """The name of the backbone whose config.json is in these files; None where none claims it."""
    return family_of(files.config, origin=str(files.folder / CONFIG))


def family_of(described: Mapping[str, Any], *, origin: str = CONFIG) -> str | None:
    """The name of the backbone that claims a config; None where none does.

    By the architecture that the config names; by its keys only where it names none. `origin` is
    what a CheckpointError names.
    """
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


def unsupported(files: ModelFiles) -> CheckpointError | None:
    """Why no backbone opens a model that none recognises; None for a masked LM of transformers."""
    folder, described = files.folder, files.config
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
    files: ModelFiles,
    room: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | Mapping[str, Any] | str = "cpu",
) -> Backbone:
    """The model of these files, whose backbone is `room`, with its weights on `device`."""
    return filled(built(room, files.config), files, dtype=dtype, device=device)


def filled(
    module: Backbone,
    files: ModelFiles,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | Mapping[str, Any] | str = "cpu",
) -> Backbone:
    """The module from `built` with the weights in these files; see `load_weights`."""
    stored = load_weights(module, files.headers, dtype=dtype, device=device, tied=module.tied)
    module.stored = frozenset(stored)
    return module


def built(room: str, described: Mapping[str, Any]) -> Backbone:
    """The module of a config, without memory for its weights (on the meta device)."""
    with torch.device("meta"):
        module: Backbone = find("backbones", room)(described)
    return module
