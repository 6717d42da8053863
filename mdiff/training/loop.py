"""Training: a recipe and a directory in, checkpoints out, as if never interrupted."""

from __future__ import annotations

import gc
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import accelerate
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from mdiff import __version__
from mdiff.errors import CheckpointError, ConfigError, DataError, MdiffError
from mdiff.files import (
    complete,
    latest,
    locked,
    read_json,
    read_tensors,
    staged,
    step_path,
    steps,
    sweep,
    verify,
    write_json,
)
from mdiff.pipeline import write_pipeline
from mdiff.training.async_save import Writer
from mdiff.training.batches import rows_of_step
from mdiff.training.build import Run, build_run
from mdiff.training.log import Journal, to_stderr
from mdiff.training.recipe import Recipe, differences, parse_recipe
from mdiff.training.state import capture, model_weights, restore
from mdiff.training.step import Outcome
from mdiff.training.zero import ZeroAccelerator, zero_was_asked_for

FORMAT = 1
TRAINING = "training.json"
TENSORS = "training.safetensors"
# What may differ in a resumed run: how far and how it runs, not what it computes.
FREE = (
    "train.steps", "train.save_every", "train.keep", "train.micro_batch", "train.workers",
    "train.compile", "train.nonfinite", "log",
)  # fmt: skip


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: str = "auto",
    report: Callable[[str], None] = to_stderr,
) -> Path:
    """Train as the recipe says; returns the last checkpoint, `out`/step-NNNNNN.

    `resume`: "auto" goes on from the newest complete checkpoint in `out`, if there is one;
    "none" starts afresh; a path is a checkpoint, or a run's directory, to go on from. On the
    CPU a resumed run gives bitwise what an uninterrupted one gives. Under `accelerate launch`
    the processes share each global batch and one of them writes.

    Raises ConfigError, DataError or CheckpointError with what does not fit, before anything
    is written; DataError at a step whose loss is not finite; KeyboardInterrupt after SIGINT
    or SIGTERM, once the checkpoint is complete.
    """
    out = Path(out)
    kind = ZeroAccelerator if zero_was_asked_for() else Accelerator
    # Said outright, processes without a GPU find each other under any launcher (by gloo).
    accelerator = kind(mixed_precision="no", cpu=not torch.accelerator.is_available())
    # A launcher's file may set it; the recipe's micro-batches are the only accumulation here.
    accelerator.gradient_accumulation_steps = 1
    path, interrupted = _train(recipe, out, accelerator, resume=resume, report=report)
    # Gloo's threads abort a process that ends while anything still refers to its group.
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    if interrupted:
        raise KeyboardInterrupt(f"interrupted: {path} is complete, --resume auto goes on")
    return path


def _train(
    recipe: Recipe, out: Path, accelerator: Accelerator, *, resume: str,
    report: Callable[[str], None],
) -> tuple[Path, bool]:  # fmt: skip
    """The last checkpoint, and whether the run was interrupted before its last step."""
    with ExitStack() as stack:
        _on_main(accelerator, lambda: _claim(stack, out))
        source = _source(out, resume)
        run = build_run(recipe, accelerator)
        start = 0 if source is None else _resume(run, source)
        _on_main(accelerator, lambda: _clear(out, start, report))
        if source is not None and start >= recipe.train.steps:
            if accelerator.is_main_process:
                report(f"step {start} of {recipe.train.steps} is done: nothing to train")
            return source, False
        journal = None
        if accelerator.is_main_process:
            journal = stack.enter_context(_journal(run, out, start=start, report=report))
        # Left before the lock is: nobody else writes while this run still does.
        writer = stack.enter_context(Writer())
        interrupted = stack.enter_context(_signals())
        return _loop(run, out, start=start, journal=journal, writer=writer, interrupted=interrupted)


def _loop(
    run: Run, out: Path, *, start: int, journal: Journal | None, writer: Writer,
    interrupted: Callable[[], bool],
) -> tuple[Path, bool]:  # fmt: skip
    """Steps `start` + 1 to the last, saved as the recipe says; see `_train`."""
    settings = run.recipe.train
    path = step_path(out, start)
    for number, rows in enumerate(run.rows.steps(start + 1), start=start + 1):
        # A save that failed stops all processes; asking for the next one then says why.
        outcome = run.stepper.step(number, rows, stopping=lambda: interrupted() or writer.failed)
        record = _record(run, number, outcome)
        if len(outcome.bad) and settings.nonfinite == "stop":
            raise DataError(
                f"step {number}: the loss or its gradient is not finite in rows "
                f"{record['rows'][:8]} of epoch {record['epoch']}; the last checkpoint is intact "
                f"(train.nonfinite=skip leaves such steps out)"
            )
        if journal is not None:
            journal.step(record)
        if number % settings.save_every == 0 or number == settings.steps or outcome.stop:
            path = _save(run, out, number, writer)
        if outcome.stop:
            break
    _on_main(run.accelerator, writer.finish)
    return path, number < settings.steps


def _record(run: Run, number: int, outcome: Outcome) -> dict[str, Any]:
    """The log line of a step."""
    settings = run.recipe.train
    rows, epochs = rows_of_step(
        number, batch_size=settings.batch_size, rows=len(run.examples), seed=settings.seed
    )
    record: dict[str, Any] = {"step": number, "epoch": int(epochs[0])}
    if len(outcome.bad):
        return record | {"skipped": True, "rows": rows[outcome.bad].tolist()}
    bits = outcome.nats / torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    return record | {
        "loss": outcome.loss,
        f"bits_per_{run.examples.unit}": bits / run.examples.units,
        "tokens": outcome.tokens,
        "lr": run.recipe.optim.lr * outcome.rate,
        "grad_norm": outcome.grad_norm,
    }


def _save(run: Run, out: Path, number: int, writer: Writer) -> Path:
    """Copy the state after step `number` and begin to write it; where it will lie.

    Waits for the save before, and raises what that one raised, in every process.
    """
    _on_main(run.accelerator, writer.finish)
    state = writer.state = capture(
        run.backbone, run.placement, run.averaged, keep=run.accelerator.is_main_process,
        into=writer.state,
    )  # fmt: skip
    if run.accelerator.is_main_process:
        writer.begin(lambda: _write(run, out, number, state))
    if not run.placement.may_be_read_beside_steps:
        _on_main(run.accelerator, writer.finish)
    return step_path(out, number)


def _write(run: Run, out: Path, number: int, state: dict[str, Tensor]) -> None:
    """Write the checkpoint after step `number`, and drop what `keep` no longer wants."""
    with staged(step_path(out, number)) as folder:
        weights = model_weights(run.backbone, state)
        cast(Any, run.backbone).save_pretrained(folder, state_dict=weights)
        run.modality.save(folder)
        _write_pipeline(run, folder)
        save_file(state, folder / TENSORS)
        write_json(folder / TRAINING, _training(run, number))
    keep = run.recipe.train.keep
    for old in steps(out)[:-keep] if keep else []:
        # Renamed first: a kill amid the removal leaves what `sweep` clears, not half a step.
        gone = step_path(out, old).rename(out / f".step-{old:06d}.tmp")
        if gone.is_symlink():
            gone.unlink()
        else:
            # The new save is complete: what cannot be removed is left to the next start.
            shutil.rmtree(gone, ignore_errors=True)


def _write_pipeline(run: Run, folder: Path) -> None:
    """What turns the model's ids into the medium and back, and how it was hidden."""
    schedule = run.recipe.objective.schedule
    write_pipeline(
        folder,
        backbone=run.recipe.model.name,
        window=run.examples.length,
        modality=run.modality.config() | {"name": run.recipe.modality.name},
        space=run.space,
        schedule={"name": schedule.name} | schedule.options,
    )


def _training(run: Run, number: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": number,
        "recipe": run.recipe.model_dump(mode="json"),
        "data": {"fingerprint": run.examples.fingerprint, "rows": len(run.examples)},
        "processes": run.accelerator.num_processes,
        "versions": {
            "mdiff": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
    }


def _source(out: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, or None to start afresh."""
    if resume == "none":
        return None
    if resume == "auto":
        return latest(out)
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(f"--resume {resume}: expected auto, none or a directory")
    found = latest(path) or path
    if not (found / TRAINING).exists():
        raise CheckpointError(f"{found} holds no training state: it cannot be resumed from")
    return found


def _resume(run: Run, source: Path) -> int:
    """Put the run back to where the checkpoint was made; the step it was made after."""
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
    changed = differences(recipe, run.recipe, ignore=FREE)
    if changed:
        shown = "; ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
        raise ConfigError(f"the recipe is not that of {source}: {shown}")
    if fingerprint != run.examples.fingerprint:
        raise DataError(
            f"the data is not that of {source}: {rows} rows with digest {fingerprint[:12]} -> "
            f"{len(run.examples)} rows with digest {run.examples.fingerprint[:12]}"
        )
    restore(read_tensors(source / TENSORS), run.backbone, run.placement, run.averaged)
    return int(step)


def _claim(stack: ExitStack, out: Path) -> None:
    """Take the right to write in `out` until the stack closes, and clear what the dead left."""
    stack.enter_context(locked(out))
    sweep(out)


def _clear(out: Path, start: int, report: Callable[[str], None]) -> None:
    """See that no checkpoint after step `start` is in the way; a damaged one is moved aside."""
    for step in (step for step in steps(out) if step > start):
        path = step_path(out, step)
        if complete(path):
            raise ConfigError(
                f"{path} would be written again by a run from step {start}: "
                f"use --resume auto or another --out"
            )
        report(f"{path} is damaged: moved aside")
        path.rename(Path(tempfile.mkdtemp(prefix="damaged-", dir=out), path.name))


def _journal(run: Run, out: Path, *, start: int, report: Callable[[str], None]) -> Journal:
    return Journal(
        out,
        start=start,
        steps=run.recipe.train.steps,
        every=run.recipe.log.every,
        unit=run.examples.unit,
        tensorboard=run.recipe.log.tensorboard,
        report=report,
    )


def _on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on the main process while the others wait; where it fails, all fail."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as caught:
            error = caught
    failed = torch.tensor([float(error is not None)], device=accelerator.device)
    failures = float(accelerator.reduce(failed, "sum"))
    if error is not None:
        raise error
    if failures:
        raise MdiffError("the main process failed; its message says why")


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether a stop was asked for by SIGINT or SIGTERM; a second SIGINT stops at once."""
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    # Python delivers signals to the main thread and lets no other one set a handler.
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return bool(accelerate.PartialState().is_main_process)
