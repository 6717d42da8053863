"""The bound of data under a model: items cut into windows, windows scored in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.modalities import Conditional, EndsText, HasParts
from mdiff.objective import Bound, hideable_places, nll_bound
from mdiff.tokens import Batch, Windows, stack_conditions

if TYPE_CHECKING:
    from mdiff.pipeline.pipeline import Pipeline

BATCH = 32
Progress = Callable[[int, int], None]


class Rows(Protocol):
    """Rows of tokens by number: `canvas.Windows`, or any `data.Examples`."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 of epochs `epoch` (B,)."""


def windows(
    pipeline: Pipeline, items: Sequence[Any], *, window: int | None = None, end: bool = False
) -> Windows:
    """The items' tokens cut into windows side by side, by default of the model's own length.

    With `end`, the token that ends an item is part of it, where the modality has one. An item
    is a window of its own where neither says how long one is.
    """
    width = window or pipeline.window
    modality = pipeline.modality
    eos = modality.eos_id if end and isinstance(modality, EndsText) else None
    rows: list[list[int]] = []
    owner: list[int] = []
    for number, item in enumerate(items):
        ids = [*modality.encode(item), *([] if eos is None else [eos])]
        step = width or max(1, len(ids))
        rows += [ids[start : start + step] for start in range(0, len(ids), step)]
        owner += [number] * (len(rows) - len(owner))
    told = pipeline.conditions(items)
    without = modality.null_condition if isinstance(modality, Conditional) else {}
    cond = stack_conditions([told[number] for number in owner], without)
    return Windows(rows, owner, pipeline.space, cond)


def bound_of_rows(
    pipeline: Pipeline,
    rows: Rows,
    *,
    given: str = "",
    estimator: str | None = None,
    draws: int = 64,
    seed: int = 0,
    batch_size: int = BATCH,
    progress: Progress | None = None,
) -> Bound:
    """The bound on -log p of each row, in nats, with its standard error, (N,), on the CPU.

    `given` names the parts that are seen and not scored, such as "a" or "a+b". `estimator` is
    as in `nll_bound`, by default "any_order", or "time" for a denoiser that uses the time. Row
    r is hidden by the stream (seed, r): the result does not depend on `batch_size`.

    Raises ConfigError for a batch_size below 1 and for parts that there are not.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: need at least 1")
    device = pipeline.device
    nats, stderr = torch.zeros(2, len(rows), dtype=torch.float64, device="cpu")
    for first in range(0, len(rows), batch_size):
        number = torch.arange(first, min(first + batch_size, len(rows)), device="cpu")
        batch = rows.batch(number, torch.zeros_like(number))
        pipeline.space.check(batch.tokens, batch.valid, masks=False)
        may_hide = _may_hide(pipeline, batch, given)
        bound = nll_bound(
            pipeline.denoiser, batch.tokens.to(device), space=pipeline.space,
            schedule=pipeline.schedule,
            estimator=estimator or ("time" if pipeline.denoiser.uses_time else "any_order"),
            draws=draws, seed=seed, sample=number.to(device),
            may_hide=None if may_hide is None else may_hide.to(device),
            valid=None if batch.valid is None else batch.valid.to(device),
            cond={name: tensor.to(device) for name, tensor in batch.cond.items()} or None,
        )  # fmt: skip
        nats[number], stderr[number] = bound.nats.cpu(), bound.stderr.cpu()
        if progress is not None:
            progress(int(number[-1]) + 1, len(rows))
    return Bound(nats, stderr)


def _may_hide(pipeline: Pipeline, batch: Batch, given: str) -> Tensor | None:
    """The places (B, L) that are scored: those of the batch outside the given parts."""
    if not given:
        return batch.may_hide
    if not pipeline.space.parts:
        raise ConfigError(f"given={given!r}: this model's canvas has no parts")
    names = pipeline.modality.part_names if isinstance(pipeline.modality, HasParts) else ()
    free = hideable_places(given, batch.tokens.shape[1], space=pipeline.space, part_names=names)
    if batch.may_hide is None:
        return free.expand_as(batch.tokens)
    return free & batch.may_hide
