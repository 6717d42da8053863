"""Writing a model so that `load` reads it: weights, modality and pipeline.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from mdiff.denoiser import Denoiser, Saveable
from mdiff.errors import ConfigError
from mdiff.files import PIPELINE, staged, write_json
from mdiff.find import names
from mdiff.modalities import HasFolders, Modality
from mdiff.schedule import SCHEDULES, Schedule
from mdiff.tokens import TokenSpace

# Of pipeline.json.
FORMAT = 1


def save_model(
    folder: Path,
    denoiser: Denoiser,
    *,
    modality: Modality,
    space: TokenSpace,
    schedule: Schedule,
    window: int | None,
) -> None:
    """Write a model into a new folder by an atomic rename; see `Pipeline.save`.

    Raises CheckpointError where the folder exists, ConfigError for a denoiser or a schedule
    that has no files.
    """
    if not isinstance(denoiser, Saveable):
        raise ConfigError(f"{type(denoiser).__name__} cannot be saved: it has no files")
    if isinstance(modality, HasFolders):
        # A published directory: each part in the folder and the layout that it came in.
        with staged(folder) as inner:
            denoiser.save_pretrained(inner / modality.denoiser_folder)
            modality.save(inner)
        return
    name = type(schedule).__name__.lower()
    if name not in SCHEDULES:
        raise ConfigError(f"the schedule {name} cannot be saved; known: {', '.join(SCHEDULES)}")
    with staged(folder) as inner:
        denoiser.save_pretrained(inner)
        modality.save(inner)
        write_pipeline(
            inner,
            backbone=_backbone_of(denoiser),
            window=window,
            modality=modality.config(),
            space=space,
            schedule={"name": name, **vars(schedule)},
        )


def _backbone_of(denoiser: Denoiser) -> str:
    """The backbone's name, that of its module; of a class made of one, that one's."""
    modules = [kind.__module__.rpartition(".")[2] for kind in type(denoiser).__mro__]
    return next((name for name in modules if name in names("backbones")), modules[0])


def write_pipeline(
    folder: Path,
    *,
    backbone: str,
    window: int | None,
    modality: Mapping[str, object],
    space: TokenSpace,
    schedule: Mapping[str, object],
) -> None:
    """Write pipeline.json: the parts by name with their options, and the trained length."""
    described = {
        "format": FORMAT,
        "backbone": backbone,
        "length": window,
        "modality": dict(modality),
        "space": asdict(space),
        "schedule": dict(schedule),
    }
    write_json(folder / PIPELINE, described)
