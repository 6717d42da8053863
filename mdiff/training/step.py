"""One training step: the loss of a micro-batch, the global gradient and update."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mdiff.denoiser import Condition, Denoiser, HasLayers
from mdiff.errors import ConfigError
from mdiff.kernels import philox
from mdiff.objective import (
    GivenParts,
    diffusion_loss,
    drop_condition,
    maskable_positions,
    stratified_times,
    truncated_normal,
)
from mdiff.process import Masking, Process
from mdiff.schedule import MIN_TIME
from mdiff.tokens import Batch, TokenSpace
from mdiff.training.batches import MicroBatch, StepRows
from mdiff.training.optim import AveragedWeights, rate_at
from mdiff.training.recipe import Recipe
from mdiff.training.state import parameters


class LossOf(nn.Module):
    """A backbone with its objective, as one module: what is distributed and called as a whole.

    `null_condition` replaces the condition of rows whose own is dropped; `given` chooses which
    parts of a canvas a row is given, None is none.
    """

    def __init__(
        self, backbone: Denoiser, recipe: Recipe, *, space: TokenSpace, process: Process,
        null_condition: Condition | None = None, given: GivenParts | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone: Denoiser = backbone
        self.recipe, self.space, self.process = recipe, space, process
        self.schedule = process.schedule
        self.null_condition, self.given = null_condition or {}, given
        objective = recipe.objective
        if objective.ratio is not None and objective.weight != "uniform":
            raise ConfigError(
                "objective.ratio draws its own share of hidden tokens: the weight must be uniform"
            )
        if not isinstance(process, Masking) and (objective.ratio or objective.label_smoothing):
            raise ConfigError("objective: ratio and label_smoothing are of masks, not of a process")
        if isinstance(process, Masking) and objective.weight not in ("bound", "uniform"):
            raise ConfigError(
                f"objective.weight={objective.weight!r} needs an objective.process that writes "
                "random tokens"
            )
        if objective.cond_drop and not self.null_condition:
            raise ConfigError(
                f"objective.cond_drop={objective.cond_drop}: this model has no condition"
            )

    @property
    def _no_split_modules(self) -> list[str]:
        """The classes of layers that accelerate gathers one by one under FSDP2.

        Those that share a parameter with the rest of the model (a tied embedding) are left to it.
        """
        named = self.backbone.no_split if isinstance(self.backbone, HasLayers) else ()
        layers = [(type(m).__name__, m) for m in self.modules() if type(m).__name__ in named]
        uses = _uses(self)
        tied = {kind for kind, layer in layers if not _uses(layer).items() <= uses.items()}
        return sorted({kind for kind, _ in layers} - tied)

    def may_hide(self, batch: Batch, *, sample: Tensor, seed: int) -> Tensor | None:
        """The positions (B, L) bool that these rows may hide; None is all."""
        if self.given is None:
            return batch.may_hide
        chosen = self.given.may_hide(seed=seed, sample=sample)
        return chosen if batch.may_hide is None else chosen & batch.may_hide

    def maskable(self, batch: Batch, *, sample: Tensor, seed: int) -> Tensor:
        """How many tokens of these rows may be hidden, a scalar int64."""
        return maskable_positions(
            batch.tokens, space=self.space, valid=batch.valid,
            may_hide=self.may_hide(batch, sample=sample, seed=seed),
        ).sum()  # fmt: skip

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
            batch.cond, null_condition=self.null_condition, share=objective.cond_drop, seed=seed,
            sample=sample,
        )  # fmt: skip
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            loss = diffusion_loss(
                self.backbone, batch.tokens, space=self.space, process=self.process,
                may_hide=self.may_hide(batch, sample=sample, seed=seed), valid=batch.valid,
                documents=batch.documents, cond=cond or None, t=t, weight=objective.weight,
                max_weight=objective.max_weight, label_smoothing=objective.label_smoothing,
                seed=seed, sample=sample, rows=train.batch_size, total=total,
            )  # fmt: skip
        return loss.value, self.schedule.weight(t) * loss.nll.detach().double().sum(1)


def _uses(module: nn.Module) -> Counter[int]:
    """How many names each parameter has within a module, by its id."""
    return Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    held = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    rows = {name: tensor.to(device, non_blocking=True) for name, tensor in held.items()}
    return replace(batch, **rows, cond={name: t.to(device) for name, t in batch.cond.items()})


@dataclass(frozen=True)
class Outcome:
    """The result of a step: loss in nats a token, bound in `bits` a unit, tokens, rate and norm.

    `bad_rows` are the numbers of the rows that were not finite: empty where all were and the
    update was made. `stop` is set where any process asked for a stop.
    """

    step: int
    epoch: int
    bad_rows: list[int]
    loss: float
    bits: float
    tokens: int
    lr: float
    grad_norm: float
    stop: bool

    def as_json(self, unit: str) -> dict[str, object]:
        """The line of the log: `step`, `epoch`, `loss`, ..., or `skipped` and `rows`."""
        found: dict[str, object] = {"step": self.step, "epoch": self.epoch}
        if self.bad_rows:
            return found | {"skipped": True, "rows": self.bad_rows}
        measured = {"loss": self.loss, f"bits_per_{unit}": self.bits, "tokens": self.tokens}
        return found | measured | {"lr": self.lr, "grad_norm": self.grad_norm}


class Stepper:
    """Runs steps of one recipe on this process; see `step`."""

    def __init__(
        self, accelerator: Accelerator, loss_of: nn.Module, rows: StepRows,
        optimizers: Sequence[torch.optim.Optimizer], averaged: AveragedWeights | None,
        recipe: Recipe,
    ) -> None:  # fmt: skip
        self.accelerator, self.loss_of, self.recipe = accelerator, loss_of, recipe
        self.rows, self.optimizers, self.averaged = rows, optimizers, averaged
        self.whole: LossOf = accelerator.unwrap_model(loss_of)
        self.parameters = parameters(self.whole.backbone)

    def step(self, number: int, rows: list[MicroBatch], *, stopping: Callable[[], bool]) -> Outcome:
        """One step on the global batch: the same update however its rows are split.

        The denominator is the global one, so the parts' losses add up; averaging gradients
        over processes is undone. Where a loss or gradient is not finite, nothing is updated.
        """
        accelerator, train = self.accelerator, self.recipe.train
        seed = int(philox.derive(train.seed, number))
        maskable = self.whole.maskable
        counts = torch.stack([maskable(batch, sample=each, seed=seed) for each, batch in rows])
        total = accelerator.reduce(counts.sum().to(accelerator.device), "sum").clamp(min=1)
        loss, bounds = self._gradients(number, rows, total=total, seed=seed)
        stop = torch.full_like(loss, float(stopping()))
        sums = accelerator.reduce(torch.stack([loss, bounds.sum(), stop]), "sum").tolist()
        optim = self.recipe.optim
        norm = float(
            accelerator.clip_grad_norm_(self.loss_of.parameters(), optim.grad_clip or torch.inf)
        )
        rate = rate_at(number, steps=train.steps, settings=optim)
        tokens, bad = int(total), torch.empty(0, dtype=torch.int64)
        if bool(torch.isfinite(torch.tensor([sums[0], norm])).all()):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * rate
                optimizer.step()
            if self.averaged is not None:
                self.averaged.update(self.parameters, step=number)
        else:
            finite = accelerator.gather(torch.isfinite(bounds).to(torch.int64)).cpu()
            bad = (finite == 0).nonzero()[:, 0]
            bad = bad if len(bad) else torch.arange(train.batch_size)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        row, epoch = self.rows.rows(number)
        return Outcome(
            step=number, epoch=int(epoch[0]), bad_rows=row[bad].tolist(), loss=sums[0],
            bits=sums[1] / tokens / math.log(2) / self.rows.examples.units, tokens=tokens,
            lr=optim.lr * rate, grad_norm=norm, stop=sums[2] > 0,
        )  # fmt: skip

    def _gradients(
        self, number: int, rows: list[MicroBatch], *, total: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Add up gradients over the micro-batches; this process's loss and rows' bounds."""
        accelerator = self.accelerator
        losses, bounds = [], []
        for index, (sample, batch) in enumerate(rows):
            # Dropout draws from torch's generator, which is seeded for each part of each step.
            noise = philox.words(
                self.recipe.train.seed, index, accelerator.process_index, number,
                philox.DROPOUT << 24,
            )  # fmt: skip
            torch.manual_seed(int(noise[0]) << 31 ^ int(noise[1]))
            last = index == len(rows) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.loss_of):
                value, bound = self.loss_of(
                    on_device(batch, accelerator.device), sample=sample.to(accelerator.device),
                    total=total, seed=seed,
                )  # fmt: skip
                accelerator.backward(value * accelerator.num_processes)
            losses.append(value.detach().double())
            bounds.append(bound)
        return torch.stack(losses).sum(), torch.cat(bounds)
