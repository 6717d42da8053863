"""The bound on validation data while a model trains, and the best checkpoint by it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mdiff.denoiser import Cache, Condition, Denoiser
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import complete, read_json, replace_file, step_path
from mdiff.objective import maskable_positions, nll_bound
from mdiff.process import Masking
from mdiff.training.build import Run
from mdiff.training.processes import on_main_says
from mdiff.training.state import parameters
from mdiff.training.step import on_device

BEST = "best.json"
BATCH = 32


@dataclass(frozen=True)
class Validation:
    """The bound after a step in bits a unit of the medium, and its standard error."""

    step: int
    bits: float
    stderr: float

    def as_json(self, unit: str) -> dict[str, object]:
        """The line of the log."""
        name = f"validation_bits_per_{unit}"
        return {"step": self.step, name: self.bits, f"{name}_stderr": self.stderr}


class Validator:
    """Measures the first `train.validate_rows` rows of the validation split, where it is due.

    They are hidden in the same ways each time, so that bounds of two steps, or of two runs over
    the same data, differ by their models alone. `best` is the best validation of the run so far,
    before step `start` too. The weights are those that a checkpoint publishes:
    the averaged ones where there are any. Training is the same to the bit as without it.
    """

    def __init__(self, run: Run, out: Path, start: int) -> None:
        self.run, options = run, run.recipe.data.options
        self.best: Validation | None = None
        if not run.recipe.train.validate_every:
            return
        if not options.get("validation"):
            raise ConfigError(
                "train.validate_every needs rows to measure: set data.validation, the share of "
                "the data for it, such as 0.05"
            )
        self.best = best_so_far(out, start)
        self.examples = run.modality.examples(
            options, length=run.recipe.data.length, split="validation"
        )
        self.rows = torch.arange(min(len(self.examples), run.recipe.train.validate_rows))

    def after(self, step: int) -> Validation | None:
        """The validation of a step for which one is due, `best` where it is; None for others."""
        every, last = self.run.recipe.train.validate_every, self.run.recipe.train.steps
        if not every or (step % every and step != last):
            return None
        found = self.measure(step)
        # The first process decides: rounding may differ between machines.
        if on_main_says(self.run.accelerator, self.best is None or found.bits < self.best.bits):
            self.best = found
        return found

    def measure(self, step: int) -> Validation:
        """The bound after a step; DataError where it is not finite."""
        size = self.run.recipe.train.micro_batch or BATCH
        with _published(self.run):
            sums = [self._sums(rows) for rows in torch.split(self.rows, size)]
        nats, variance, tokens = map(sum, zip(*sums))
        scale = max(tokens, 1) * self.examples.units * math.log(2)
        if not math.isfinite(nats):
            raise DataError(f"step {step}: the bound of the validation rows is not finite")
        return Validation(step, nats / scale, math.sqrt(variance) / scale)

    def _sums(self, rows: Tensor) -> tuple[float, float, float]:
        """Nats, variance of their estimate and maskable tokens of some rows."""
        run, model = self.run, self.run.backbone
        batch = on_device(self.examples.batch(rows, torch.zeros_like(rows)), run.accelerator.device)
        if not isinstance(model, Denoiser):
            raise ConfigError("train.validate_every: this model is not a Denoiser")
        process = run.stepper.whole.process
        noisy = not isinstance(process, Masking)
        bound = nll_bound(
            model if batch.documents is None else _OfDocuments(model, batch.documents),
            batch.tokens, space=run.space, schedule=process.schedule, process=process,
            estimator="time" if model.uses_time or noisy else "any_order",
            draws=run.recipe.train.validate_draws, seed=run.recipe.train.seed,
            may_hide=batch.may_hide, valid=batch.valid, cond=batch.cond or None,
            sample=rows.to(batch.tokens.device),
        )  # fmt: skip
        maskable = maskable_positions(
            batch.tokens, space=run.space, may_hide=batch.may_hide, valid=batch.valid
        )
        return float(bound.nats.sum()), float(bound.stderr.square().sum()), float(maskable.sum())


class _OfDocuments:
    """A Denoiser of rows of packed documents."""

    def __init__(self, denoiser: Denoiser, documents: Tensor) -> None:
        self.denoiser, self.given, self.uses_time = denoiser, documents, denoiser.uses_time

    def __call__(
        self, tokens: Tensor, *, at: Tensor | None = None, valid: Tensor | None = None,
        documents: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        cache: Cache | None = None,
    ) -> Tensor:  # fmt: skip
        """The denoiser's logits, each document by itself."""
        return self.denoiser(tokens, at=at, valid=valid, documents=self.given, t=t, cond=cond)


@contextmanager
def _published(run: Run) -> Iterator[None]:
    """The model without dropout, and with its averaged weights; both as before afterwards."""
    live = parameters(run.backbone) if run.averaged is not None else {}
    kept = {name: parameter.detach().clone() for name, parameter in live.items()}
    was_training = run.backbone.training
    run.backbone.eval()
    try:
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(run.averaged.tensors[name] if run.averaged else parameter)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(kept[name])
        run.backbone.train(was_training)


def best_so_far(out: Path, start: int) -> Validation | None:
    """The best validation up to step `start` of a run, where its checkpoint is complete."""
    try:
        found = read_json(out / BEST)
        best = Validation(int(found["step"]), float(found["bits"]), float(found["stderr"]))
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
    return best if best.step <= start and complete(step_path(out, best.step)) else None


def write_best(out: Path, best: Validation) -> None:
    """Name the best checkpoint of a run, in `best.json`."""
    replace_file(out / BEST, [json.dumps(asdict(best)).encode() + b"\n"])
