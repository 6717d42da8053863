"""Training: a recipe and a directory in, checkpoints out, as if never interrupted."""

import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from accelerate import Accelerator

from mdiff.errors import DataError
from mdiff.files import locked, step_path, sweep
from mdiff.process_state import kept_generators
from mdiff.training.async_save import Writer
from mdiff.training.build import Run, build_run
from mdiff.training.checkpoint import (
    checkpoint_to_resume,
    clear_later_steps,
    resume_from,
    write_checkpoint,
)
from mdiff.training.log import Journal, start_trackers, to_stderr, tracker_classes
from mdiff.training.processes import on_main, started
from mdiff.training.recipe import Recipe, values
from mdiff.training.state import capture, is_sharded
from mdiff.training.validation import Validation, Validator

# What asks a run to save its step and end: Ctrl-C, a launcher, a terminal that closes.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@kept_generators()
def train(
    recipe: Recipe, out: Path | str, *, resume: str = "auto",
    report: Callable[[str], None] = to_stderr, stops: Sequence[signal.Signals] = STOPS,
) -> Path:  # fmt: skip
    """Train as the recipe says; returns the last checkpoint, `out`/step-NNNNNN.

    `resume`: "auto" resumes from the newest complete checkpoint in `out`, if there is one;
    "none" starts afresh; a path is the checkpoint, or the run's directory, to resume from. On
    the CPU a resumed run gives bitwise what an uninterrupted one gives. Under `accelerate launch`
    the processes share each global batch and one of them writes. The global generators of torch,
    numpy and Python are left as they were.

    Raises ConfigError, DataError or CheckpointError for what does not fit, before anything is
    written; DataError at a step whose loss is not finite; KeyboardInterrupt after one of the
    signals `stops` (SIGINT, SIGTERM and SIGHUP), once the checkpoint is complete.
    """
    out = Path(out)
    tracker_classes(recipe.log)
    accelerator = started()
    path, interrupted = _train(recipe, out, accelerator, resume=resume, report=report, stops=stops)
    # Gloo's threads abort a process that ends while anything still refers to its group.
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
    if interrupted:
        raise KeyboardInterrupt(f"interrupted: {path} is complete, --resume auto goes on")
    return path


def _train(
    recipe: Recipe, out: Path, accelerator: Accelerator, *, resume: str,
    report: Callable[[str], None], stops: Sequence[signal.Signals],
) -> tuple[Path, bool]:  # fmt: skip
    """The last checkpoint, and whether the run was interrupted before its last step."""
    if not accelerator.is_main_process:
        report = _silent
    with ExitStack() as stack:
        on_main(accelerator, lambda: _claim(stack, out))
        source = checkpoint_to_resume(out, resume, report=report)
        run = build_run(recipe, accelerator, source)
        start = 0 if source is None else resume_from(run, source, report=report)
        on_main(accelerator, lambda: clear_later_steps(out, start, report))
        if source is not None and start >= recipe.train.steps:
            report(f"step {start} of {recipe.train.steps} is done: nothing to train")
            return source, False
        journal = None
        if accelerator.is_main_process:
            trackers = start_trackers(recipe.log, out, start=start, settings=values(recipe))
            journal = Journal(
                out, start=start, steps=recipe.train.steps, every=recipe.log.every,
                unit=run.examples.unit, trackers=trackers, report=report,
            )  # fmt: skip
            stack.callback(journal.close)
        # Its exit comes before the lock's release: no other run writes while this one still does.
        writer = stack.enter_context(Writer())
        interrupted = stack.enter_context(_signals(stops))
        return _loop(run, out, start=start, journal=journal, writer=writer, interrupted=interrupted)


def _loop(
    run: Run, out: Path, *, start: int, journal: Journal | None, writer: Writer,
    interrupted: Callable[[], bool],
) -> tuple[Path, bool]:  # fmt: skip
    """Steps `start` + 1 to the last, saved as the recipe says; see `_train`."""
    settings = run.recipe.train
    path, validator = step_path(out, start), Validator(run, out, start)
    for number, rows in enumerate(run.rows.steps(start + 1), start=start + 1):
        # A save that failed stops all processes; the next save then raises its exception.
        outcome = run.stepper.step(number, rows, stopping=lambda: interrupted() or writer.failed)
        if outcome.bad_rows and settings.nonfinite == "stop":
            raise DataError(
                f"step {number}: the loss or its gradient is not finite in rows "
                f"{outcome.bad_rows[:8]} of epoch {outcome.epoch}; the last checkpoint is intact "
                f"(train.nonfinite=skip leaves such steps out)"
            )
        if journal is not None:
            journal.step(outcome)
        found = validator.after(number)
        is_best = found is not None and found is validator.best
        if journal is not None and found is not None:
            journal.validated(found, is_best=is_best)
        is_due = number % settings.save_every == 0 or number == settings.steps
        if is_best or is_due or outcome.stop:
            path = _save(run, out, number, writer, validator.best)
        if outcome.stop:
            break
    on_main(run.accelerator, writer.finish)
    if journal is not None and settings.validate_every:
        journal.curve(validator.best)
    return path, number < settings.steps


def _save(run: Run, out: Path, number: int, writer: Writer, best: Validation | None) -> Path:
    """Copy the state after step `number` and begin to write it; returns its path.

    Waits for the save before, and raises that one's exception, in every process.
    """
    on_main(run.accelerator, writer.finish)
    state = writer.state = capture(run.backbone, run.optimizers, run.averaged, into=writer.state)
    if run.accelerator.is_main_process:
        writer.begin(lambda: write_checkpoint(run, out, number, state, best))
    # The writer reads the module's structure; FSDP2 replaces a layer's parameters in a forward.
    if is_sharded(run.backbone):
        on_main(run.accelerator, writer.finish)
    return step_path(out, number)


def _silent(line: str) -> None:
    """What the other processes report: nothing."""


def _claim(stack: ExitStack, out: Path) -> None:
    """Lock `out` until the stack closes, and remove the temporary files of killed runs."""
    stack.enter_context(locked(out))
    sweep(out)


@contextmanager
def _signals(stops: Sequence[signal.Signals]) -> Iterator[Callable[[], bool]]:
    """Whether one of `stops` has asked for a stop; a second SIGINT stops at once."""
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in asked:
            raise KeyboardInterrupt
        asked.append(number)

    # Python delivers signals to the main thread and lets no other one set a handler.
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in stops if main}
    for number, handler in list(before.items()):
        # nohup has SIGHUP ignored; a handler that Python did not set could not be put back.
        if handler is None or (number, handler) == (signal.SIGHUP, signal.SIG_IGN):
            del before[number]
        else:
            signal.signal(number, remember)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
