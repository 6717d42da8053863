"""Writing a model so that `load` reads it: weights, modality and pipeline.json."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mdiff.denoiser import Denoiser, Saveable, of_peft, prediction_of, unwrapped
from mdiff.errors import CheckpointError, ConfigError, nearest
from mdiff.files import (
    GENERATION_CONFIG,
    MOST_IDS,
    PIPELINE,
    STRICT,
    GenerationConfig,
    staged,
    write_json,
)
from mdiff.find import names
from mdiff.modalities import HasFolders, HasSpecialTokens, Modality
from mdiff.process import PROCESSES, Masking, Process, named_process
from mdiff.schedule import SCHEDULES, Schedule, named_schedule
from mdiff.tokens import TokenSpace


class Part(BaseModel):
    """A part by its name; `options` are what its constructor checks."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str

    @property
    def options(self) -> dict[str, object]:
        """The other entries."""
        return dict(self.model_extra or {})


class Noise(Part):
    """A schedule, whose options are numbers."""

    __pydantic_extra__: dict[str, float] = Field(init=False)


class NoiseProcess(Noise):
    """A process on that schedule, and what the model predicts."""

    predicts: Literal["leave_one_out", "posterior"]


class Space(BaseModel):
    """The entries of a `TokenSpace`."""

    model_config = STRICT
    # Sets of ids are made: those of a caption and of labels follow a codec's.
    vocab_size: Annotated[int, Field(le=2 * MOST_IDS)]
    mask_id: int
    never: list[int] = []
    parts: list[Annotated[list[int], Field(min_length=3, max_length=3)]] = []


class Card(BaseModel):
    """What pipeline.json holds; `length` is the window that the model was trained on."""

    model_config = ConfigDict(strict=True)
    format: Literal[1] = Field(description="format 1")
    backbone: str
    length: Annotated[int, Field(ge=1)] | None
    modality: Part
    space: Space
    schedule: Noise
    process: NoiseProcess | None = None
    never_generated: list[int] = []

    def noise(self) -> tuple[Schedule, Process | None]:
        """The schedule, and the process on it; ConfigError for what is none."""
        options: dict[str, Any] = self.schedule.options
        schedule = named_schedule(self.schedule.name, **options)
        if self.process is None:
            return schedule, None
        own: dict[str, Any] = self.process.options
        return schedule, named_process(self.process.name, schedule, **own)


def save_model(
    folder: Path,
    denoiser: Denoiser,
    *,
    modality: Modality,
    space: TokenSpace,
    schedule: Schedule,
    window: int | None,
    never_generated: tuple[int, ...] = (),
    stated: GenerationConfig = GenerationConfig(),  # noqa: B008
    process: Process | None = None,
) -> None:
    """Write a model into a new folder by an atomic rename; see `Pipeline.save`.

    A denoiser in torch.compile or DataParallel is saved as the model inside. Raises
    CheckpointError where the folder exists or weights are not finite, ConfigError for a denoiser
    or a schedule that has no files, and for what `load` would not take: nothing is written then.
    """
    inner = unwrapped(denoiser) if isinstance(denoiser, nn.Module) else denoiser
    if not isinstance(inner, Saveable):
        raise ConfigError(f"{type(inner).__name__} cannot be saved: it has no files")
    if isinstance(inner, nn.Module):
        _check_weights(inner)
    if isinstance(modality, HasFolders):
        # A published directory: each part in the folder and the layout that it came in.
        with staged(folder) as part:
            inner.save_pretrained(part / modality.denoiser_folder)
            modality.save(part)
        return
    name = type(schedule).__name__.lower()
    if name not in SCHEDULES:
        raise ConfigError(f"the schedule {name} cannot be saved; known: {', '.join(SCHEDULES)}")
    backbone, medium = _backbone_of(inner), modality.config()
    if medium["name"] not in names("modalities"):
        known = nearest(str(medium["name"]), names("modalities"))
        raise ConfigError(f"the modality {medium['name']!r} cannot be saved: no part; {known}")
    if not fits(modality, space, never_generated):
        raise ConfigError(
            f"the modality has {_written(modality.space)} ids beside the mask, the space "
            f"{_written(space)}: they cannot be saved together"
        )
    with staged(folder) as part:
        inner.save_pretrained(part)
        modality.save(part)
        if written := stated.model_dump(exclude_none=True):
            write_json(part / GENERATION_CONFIG, written)
        write_pipeline(
            part, backbone=backbone, window=window, modality=medium, space=space,
            schedule={"name": name, **vars(schedule)}, never_generated=never_generated,
            process=described_process(process, inner),
        )  # fmt: skip


def described_process(process: Process | None, denoiser: object) -> dict[str, object] | None:
    """What pipeline.json holds of a process, None of masks; ConfigError for one without files."""
    if process is None or isinstance(process, Masking):
        return None
    name, own = type(process).__name__.lower(), dict(vars(process))
    if name not in PROCESSES:
        raise ConfigError(f"the process {name} cannot be saved; known: {', '.join(PROCESSES)}")
    del own["schedule"]
    return {"name": name, **own, "predicts": prediction_of(denoiser)}


def fits(modality: Modality, space: TokenSpace, never_generated: tuple[int, ...]) -> bool:
    """Whether a modality has the ids of a space, but for those that are never generated."""
    lacking = set(never_generated)
    if lacking and isinstance(modality, HasSpecialTokens):
        lacking &= modality.no_text(space.vocab_size, special=False)
    return _written(modality.space) == _written(space) - len(lacking)


def _written(space: TokenSpace) -> int:
    """How many ids there are beside the mask, which some heads have a column for."""
    return space.vocab_size - (space.mask_id < space.vocab_size)


def _check_weights(denoiser: nn.Module) -> None:
    """Raise ConfigError for a model with adapters, CheckpointError for weights of no value."""
    if any(of_peft(module) for module in denoiser.modules()):
        raise ConfigError("the model holds adapters of peft: merge_and_unload() them first")
    check_finite(denoiser.named_parameters())


def check_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError for the first of these named weights that holds NaN or infinities."""
    for name, weight in weights:
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{name} holds NaN or infinite numbers: nothing was saved")


def _backbone_of(denoiser: object) -> str:
    """The backbone's name, that of its module; of a class made of one, that one's.

    Raises ConfigError where `load` would find no backbone of that name.
    """
    known = names("backbones")
    for kind in type(denoiser).__mro__:
        name = kind.__module__.rpartition(".")[2]
        if name in known:
            return name
    raise ConfigError(
        f"{type(denoiser).__name__} cannot be saved: it is of no file in backbones/, where load "
        "looks for it"
    )


def write_pipeline(
    folder: Path,
    *,
    backbone: str,
    window: int | None,
    modality: Mapping[str, object],
    space: TokenSpace,
    schedule: Mapping[str, object],
    never_generated: tuple[int, ...] = (),
    process: Mapping[str, object] | None = None,
) -> None:
    """Write pipeline.json: the parts by name with their options, and the trained length."""
    described = {
        "format": 1,
        "backbone": backbone,
        "length": window,
        "modality": dict(modality),
        "space": asdict(space),
        "schedule": dict(schedule),
    }
    if process is not None:
        described["process"] = dict(process)
    if never_generated:
        described["never_generated"] = list(never_generated)
    write_json(folder / PIPELINE, described)
