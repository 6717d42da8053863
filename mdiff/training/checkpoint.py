"""Checkpoints of a run: the model's files, and the training state from which a run resumes."""

import platform
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from mdiff import __version__
from mdiff.denoiser import Saveable
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import (
    damage,
    latest,
    read_json,
    read_tensors,
    staged,
    step_path,
    steps,
    verify,
    write_json,
)
from mdiff.pipeline import check_finite, described_process, write_pipeline
from mdiff.tokens import Sliced
from mdiff.training.build import Run
from mdiff.training.processes import on_main
from mdiff.training.recipe import differences, parse_recipe
from mdiff.training.state import check, model_weights, restore
from mdiff.training.validation import Validation, write_best

# Of training.json.
FORMAT = 1
TRAINING = "training.json"
TENSORS = "training.safetensors"
# Keys that a resumed run may change: its length and how it runs, not what it computes.
FREE = (
    "train.steps", "train.save_every", "train.keep", "train.micro_batch", "train.workers",
    "train.compile", "train.nonfinite", "train.validate_every",
    "train.validate_rows", "train.validate_draws", "log",
)  # fmt: skip
# Keys that say where the data is and how it is read: free where the rows are the same.
LOCATION = ("data.source", "data.field", "data.separator")


def write_checkpoint(
    run: Run, out: Path, number: int, state: dict[str, Tensor], best: Validation | None = None
) -> None:
    """Write the captured `state` after step `number`; remove checkpoints beyond `train.keep`.

    The one of the `best` validation is kept, and named once it is complete. Raises
    CheckpointError, with nothing written, for a state that is not finite.
    """
    check_finite(state.items())
    schedule = run.recipe.objective.schedule
    with staged(step_path(out, number)) as folder:
        weights = model_weights(run.backbone, state)
        cast(Saveable, run.backbone).save_pretrained(folder, state_dict=weights)
        run.modality.save(folder)
        write_pipeline(
            folder,
            backbone=run.recipe.model.name,
            window=run.examples.length,
            modality=run.modality.config() | {"name": run.recipe.modality.name},
            space=run.space,
            schedule={"name": schedule.name} | schedule.options,
            process=described_process(run.stepper.whole.process, run.stepper.whole.backbone),
        )
        save_file(state, folder / TENSORS)
        examples = run.examples
        # What names the data: a resumed run must have the same, an evaluation looks for it.
        data = {"fingerprint": examples.fingerprint, "rows": len(examples)}
        sliced = {"sha256": examples.slice_sha256} if isinstance(examples, Sliced) else {}
        write_json(folder / TRAINING, {
            "format": FORMAT,
            "step": number,
            "recipe": run.recipe.model_dump(mode="json"),
            "data": data | sliced,
            "processes": run.accelerator.num_processes,
            "versions": {
                "mdiff": __version__, "python": platform.python_version(),
                "torch": torch.__version__,
                # Not by an import: of transformers it takes seconds.
                **{name: version(name) for name in ("transformers", "accelerate")},
            },
        })  # fmt: skip
    if best is not None and best.step == number:
        write_best(out, best)
    _remove_old(out, run.recipe.train.keep, best)


def _remove_old(out: Path, keep: int | None, best: Validation | None) -> None:
    """Remove checkpoints but the last `keep` (None: all) and the best."""
    for old in steps(out)[:-keep] if keep else []:
        if best is not None and old == best.step:
            continue
        # Renamed first: a removal that is killed leaves what `sweep` clears, not half a step.
        gone = step_path(out, old).rename(out / f".step-{old:06d}.tmp")
        if gone.is_symlink():
            gone.unlink()
        else:
            # The new checkpoint is complete: what cannot be removed is left to the next start.
            shutil.rmtree(gone, ignore_errors=True)


def checkpoint_to_resume(out: Path, resume: str, *, report: Callable[[str], None]) -> Path | None:
    """The checkpoint that `resume` (auto, none or a directory) means, None for a fresh start."""
    if resume == "none":
        return None
    if resume == "auto":
        # `clear_later_steps` says what is passed over.
        return latest(out, say=lambda line: None)
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"--resume {resume}: expected auto, none or a directory")
    found = latest(path, say=report) or path
    if not (found / TRAINING).exists():
        raise CheckpointError(f"{found} holds no training state: it cannot be resumed from")
    return found


def resume_from(run: Run, source: Path, *, report: Callable[[str], None]) -> int:
    """Restore the run to the state of a checkpoint; returns the checkpoint's step.

    Data that has moved (LOCATION) is reported where it is the same data.

    Raises CheckpointError, ConfigError or DataError, with nothing changed, where files are
    damaged, or recipe or data are not those of the checkpoint.
    """
    try:
        verify(source)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; move {source} out of its run, and --resume auto goes on from the one before"
        ) from None
    training = read_json(source / TRAINING)
    try:
        if training["format"] != FORMAT:
            raise KeyError
        step, data = training["step"], training["data"]
        fingerprint, rows = data["fingerprint"], data["rows"]
        recipe = parse_recipe(training["recipe"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{source / TRAINING} is not of format {FORMAT}: {error}") from None
    differs = differences(recipe, run.recipe, ignore=FREE).items()
    changed = {key: f"{key}: {old!r} -> {new!r}" for key, (old, new) in differs}
    moved = "; ".join(changed.pop(key) for key in LOCATION if key in changed)
    if changed:
        raise ConfigError(f"the recipe is not that of {source}: {'; '.join(changed.values())}")
    if fingerprint != run.examples.fingerprint:
        raise DataError(
            f"the data is not that of {source}: {rows} rows with digest {fingerprint[:12]} -> "
            f"{len(run.examples)} rows with digest {run.examples.fingerprint[:12]}"
            f"{f'; {moved}' if moved else ''}"
        )
    if moved:
        report(f"{moved}: it is the same data")
    tensors: dict[str, Tensor] = {}
    parts = run.backbone, run.optimizers, run.averaged

    def read() -> None:
        tensors.update(read_tensors(source / TENSORS))
        check(tensors, *parts)

    on_main(run.accelerator, read)
    restore(tensors, *parts)
    return int(step)


def clear_later_steps(out: Path, start: int, report: Callable[[str], None]) -> None:
    """Move damaged checkpoints after step `start` aside; ConfigError for a complete one."""
    for path in (step_path(out, step) for step in steps(out) if step > start):
        problem = damage(path)
        if problem is None:
            raise ConfigError(
                f"{path} would be written again by a run from step {start}: "
                f"use --resume auto or another --out"
            )
        report(f"{path} is damaged ({problem}): moved aside")
        path.rename(Path(tempfile.mkdtemp(prefix="damaged-", dir=out), path.name))
