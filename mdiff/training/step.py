"""One training step: the rows of a process, the loss of a micro-batch, the global update."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mdiff.denoiser import Condition
from mdiff.errors import ConfigError, DataError
from mdiff.kernels import philox
from mdiff.objective import (
    GivenParts,
    drop_condition,
    maskable_positions,
    masked_diffusion_loss,
    stratified_times,
    truncated_normal,
)
from mdiff.pipeline.batch import leave_with_parent
from mdiff.schedule import MIN_TIME, Schedule
from mdiff.tokens import Batch, Examples, TokenSpace
from mdiff.training.batches import rows_of_step
from mdiff.training.optim import AveragedWeights, rate_at
from mdiff.training.recipe import Recipe, Train
from mdiff.training.state import Placement

# A part of a step's rows: their ids within the global batch (B,) int64, and the rows.
MicroBatch = tuple[Tensor, Batch]


class StepRows(Dataset[list[MicroBatch]]):
    """The rows of each step that belong to one process, as its micro-batches.

    Process `rank` of `world` holds a run of batch_size / world rows, cut into micro-batches.
    ConfigError where the processes do not share the batch evenly.
    """

    def __init__(self, examples: Examples, *, train: Train, rank: int, world: int) -> None:
        if train.batch_size % world:
            raise ConfigError(
                f"train.batch_size={train.batch_size}: expected a multiple of {world} processes"
            )
        self.examples, self.train = examples, train
        share = train.batch_size // world
        self.samples = torch.arange(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """The micro-batches of step 1, 2, ..."""
        row, epoch = rows_of_step(
            step,
            batch_size=self.train.batch_size,
            rows=len(self.examples),
            seed=self.train.seed,
        )
        size = self.train.micro_batch or len(self.samples)
        return [
            (sample, self.examples.batch(row[sample], epoch[sample]))
            for sample in torch.split(self.samples, size)
        ]

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of step `first` to the last, prepared by `train.workers` processes.

        They are started by a server of one thread: a fork of this process, which by now has
        many, may never wake up. A script that trains with workers needs the usual guard
        `if __name__ == "__main__"`.
        """
        if self.train.workers:
            multiprocessing.set_forkserver_preload(["mdiff.training.loader_server"])
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, self.train.steps + 1),
            num_workers=self.train.workers,
            collate_fn=_as_is,
            multiprocessing_context="forkserver" if self.train.workers else None,
            worker_init_fn=_leave_signals_to_the_trainer,
            # The loader seeds its workers from a generator: not from the global one.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except RuntimeError as error:
            # What a worker raises keeps its type; that one was killed, torch says in words.
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a process that prepares rows died ({str(error).splitlines()[0]}); the last "
                "checkpoint is intact: --resume auto goes on, train.workers=0 needs no such process"
            ) from error


def _as_is(batch: list[MicroBatch]) -> list[MicroBatch]:
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM reach every process; the step under way needs its rows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)
    # The trainer is the parent of their server, not theirs: torch looks out for the wrong one.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _end_next_time(number: int, frame: FrameType | None) -> None:
    """The first SIGTERM is the group's, a second one is meant for this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class LossOf(nn.Module):
    """A backbone with its objective, as one module: what is distributed and called as a whole.

    `without` is the condition that says nothing, for rows whose own is left out; `given`
    chooses which parts of a canvas a row is given, None is none.
    """

    def __init__(
        self, backbone: nn.Module, recipe: Recipe, *, space: TokenSpace, schedule: Schedule,
        without: Condition | None = None, given: GivenParts | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone
        self.recipe, self.space, self.schedule = recipe, space, schedule
        self.without, self.given = without or {}, given
        objective = recipe.objective
        if objective.ratio is not None and objective.weight != "uniform":
            raise ConfigError(
                "objective.ratio draws its own share of hidden tokens: the weight must be uniform"
            )
        if objective.cond_drop and not self.without:
            raise ConfigError(
                f"objective.cond_drop={objective.cond_drop}: this model has no condition"
            )

    def may_hide(self, batch: Batch, *, sample: Tensor, seed: int) -> Tensor | None:
        """The places (B, L) bool that these rows may hide; None is all."""
        if self.given is None:
            return batch.may_hide
        chosen = self.given.may_hide(seed=seed, sample=sample)
        return chosen if batch.may_hide is None else chosen & batch.may_hide

    def times(self, sample: Tensor, *, seed: int) -> Tensor:
        """The rows' times (B,) float64, stratified over the global batch."""
        objective = self.recipe.objective
        t = stratified_times(sample, self.recipe.train.batch_size, seed=seed)
        if objective.ratio is None:
            return t
        share = truncated_normal(t, **objective.ratio.model_dump())
        return self.schedule.time_at(share).clamp(MIN_TIME, 1.0)

    def forward(
        self, batch: Batch, *, sample: Tensor, total: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """The loss of these rows, as their part of the global one, and their bounds.

        `sample` (B,) are the rows' ids within the step, `total` the maskable tokens of the
        global batch. Returns the loss, a scalar, and (B,) nats: w(t) times the rows' -log p.
        """
        train, objective = self.recipe.train, self.recipe.objective
        device = batch.tokens.device
        t = self.times(sample, seed=seed)
        cond = drop_condition(
            batch.cond,
            null_condition=self.without,
            share=objective.cond_drop,
            seed=seed,
            sample=sample,
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            loss = masked_diffusion_loss(
                self.backbone,  # type: ignore[arg-type]
                batch.tokens,
                space=self.space,
                schedule=self.schedule,
                may_hide=self.may_hide(batch, sample=sample, seed=seed),
                valid=batch.valid,
                documents=batch.documents,
                cond=cond or None,
                t=t,
                weight=self._clipped if objective.max_weight else objective.weight,
                label_smoothing=objective.label_smoothing,
                seed=seed,
                sample=sample,
                rows=train.batch_size,
                total=total,
            )
        return loss.value, self.schedule.weight(t) * loss.nll.detach().double().sum(1)

    def _clipped(self, t: Tensor) -> Tensor:
        objective = self.recipe.objective
        weight = self.schedule.weight(t) if objective.weight == "bound" else torch.ones_like(t)
        return weight.clamp(max=objective.max_weight)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return Batch(
        tokens=batch.tokens.to(device, non_blocking=True),
        valid=move(batch.valid),
        documents=move(batch.documents),
        may_hide=move(batch.may_hide),
        cond={name: tensor.to(device) for name, tensor in batch.cond.items()},
    )


@dataclass(frozen=True)
class Outcome:
    """What a step did: mean loss and bound in nats a token, tokens, and the rows that were bad.

    `bad` (rows,) int64 are ids within the global batch: empty where all was finite, and then
    the update was made.
    """

    loss: float
    nats: float
    tokens: int
    grad_norm: float
    rate: float
    stop: bool
    bad: Tensor


class Stepper:
    """Runs steps of one recipe on this process; see `step`."""

    def __init__(
        self,
        accelerator: Accelerator,
        loss_of: nn.Module,
        placement: Placement,
        optimizers: list[Any],
        averaged: AveragedWeights | None,
        recipe: Recipe,
    ) -> None:
        self.accelerator, self.loss_of, self.placement = accelerator, loss_of, placement
        self.optimizers, self.averaged, self.recipe = optimizers, averaged, recipe
        self.whole: LossOf = accelerator.unwrap_model(loss_of)

    def step(self, number: int, rows: list[MicroBatch], *, stopping: Callable[[], bool]) -> Outcome:
        """One step on the global batch: the same update however its rows are split.

        The denominator is the global one, so the parts' losses add up; averaging gradients
        over processes is undone. Where anything is not finite, nothing is updated.
        """
        accelerator, train = self.accelerator, self.recipe.train
        seed = int(philox.derive(train.seed, number))
        counts = torch.stack([
            self._maskable_tokens(batch, sample=sample, seed=seed) for sample, batch in rows
        ]).sum()  # fmt: skip
        total = accelerator.reduce(counts.to(accelerator.device), "sum").clamp(min=1)
        loss, bounds = self._gradients(number, rows, total=total, seed=seed)
        stop = torch.full_like(loss, float(stopping()))
        sums = accelerator.reduce(torch.stack([loss, bounds.sum(), stop]), "sum").tolist()
        clip = self.recipe.optim.grad_clip or torch.inf
        norm = accelerator.clip_grad_norm_(self.loss_of.parameters(), clip)
        rate = rate_at(number, steps=train.steps, settings=self.recipe.optim)
        tokens = int(total)
        grad_norm = float(norm)
        bad = torch.empty(0, dtype=torch.int64)
        if all(torch.isfinite(torch.tensor([sums[0], grad_norm])).tolist()):
            self._update(number, rate)
        else:
            finite = accelerator.gather(torch.isfinite(bounds).to(torch.int64)).cpu()
            bad = (finite == 0).nonzero()[:, 0]
            bad = bad if len(bad) else torch.arange(train.batch_size)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return Outcome(sums[0], sums[1] / tokens, tokens, grad_norm, rate, sums[2] > 0, bad)

    def _maskable_tokens(self, batch: Batch, *, sample: Tensor, seed: int) -> Tensor:
        whole = self.whole
        may_hide = whole.may_hide(batch, sample=sample, seed=seed)
        return maskable_positions(
            batch.tokens, space=whole.space, may_hide=may_hide, valid=batch.valid
        ).sum()

    def _gradients(
        self, number: int, rows: list[MicroBatch], *, total: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Add up gradients over the micro-batches; this process's loss and rows' bounds."""
        accelerator = self.accelerator
        losses, bounds = [], []
        for index, (sample, batch) in enumerate(rows):
            # Dropout draws from torch's own generator, set anew for each part of each step.
            noise = philox.words(
                self.recipe.train.seed, index, accelerator.process_index, number,
                philox.DROPOUT << 24,
            )  # fmt: skip
            torch.manual_seed(int(noise[0]) << 31 ^ int(noise[1]))
            last = index == len(rows) - 1
            wait = contextlib.nullcontext() if last else accelerator.no_sync(self.loss_of)
            with wait:
                value, bound = self.loss_of(
                    on_device(batch, accelerator.device),
                    sample=sample.to(accelerator.device),
                    total=total,
                    seed=seed,
                )
                accelerator.backward(value * accelerator.num_processes)
            losses.append(value.detach().double())
            bounds.append(bound)
        return torch.stack(losses).sum(), torch.cat(bounds)

    def _update(self, number: int, rate: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            optimizer.step()
        if self.averaged is not None:
            self.averaged.update(self.placement.parts(), step=number)
