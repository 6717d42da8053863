"""The bound of data under a model: items cut into windows, windows scored in batches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.modalities import Conditional, EndsText, HasParts, Modality, ShowsImages
from mdiff.objective import Bound, hideable_positions, nll_bound
from mdiff.pipeline.options import Model
from mdiff.tokens import Batch, Windows, check_documents, stack_conditions

BATCH = 32
# The last dimension of one image's array.
CHANNELS = (1, 3, 4)
Progress = Callable[[int, int], None]


def items_of(modality: Modality, items: object) -> list[object]:
    """The items as a list: a text, a mapping, an image and the array of one item are one of them.

    Arrays of several images are (N, H, W) or (N, H, W, C), of several rows of ids (N, L).
    """
    one = isinstance(items, str | Mapping)
    if isinstance(items, np.ndarray | Tensor):
        one = items.ndim < 2
        if isinstance(modality, ShowsImages):
            one = items.ndim == 2 or (items.ndim == 3 and items.shape[2] in CHANNELS)
    return [items] if one or not isinstance(items, Iterable) else list(items)


class Rows(Protocol):
    """Rows of tokens by number: `tokens.Windows`, or any `tokens.Examples`."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 of epochs `epoch` (B,)."""


def windows(
    model: Model, items: Sequence[object], *, window: int | None = None, end: bool = False
) -> Windows:
    """The items' tokens cut into windows side by side, by default of the model's own length.

    With `end`, the token that ends an item is part of it, where the modality has one. An item
    is a window of its own where neither says how long one is. Raises DataError, with item and
    position, where one holds the mask or an id outside the model's.
    """
    modality, width = model.modality, window or model.window
    eos = modality.eos_id if end and isinstance(modality, EndsText) else None
    rows: list[list[int]] = []
    owner: list[int] = []
    encoded = [[*modality.encode(item), *([] if eos is None else [eos])] for item in items]
    check_documents(encoded, model.space)
    for number, ids in enumerate(encoded):
        step = width or max(1, len(ids))
        rows += [ids[start : start + step] for start in range(0, len(ids), step)]
        owner += [number] * (len(rows) - len(owner))
    cond: dict[str, Tensor] = {}
    if isinstance(modality, Conditional):
        # An item that names nothing is an image: a path would be taken for a prompt.
        each = [modality.condition(item if isinstance(item, Mapping) else {}) for item in items]
        cond = stack_conditions([each[number] for number in owner], modality.null_condition)
    return Windows(rows, owner, model.space, cond)


def bound_of_rows(
    model: Model, rows: Rows, *, given: str = "", estimator: str | None = None, draws: int = 64,
    seed: int = 0, batch_size: int = BATCH, progress: Progress | None = None,
) -> Bound:  # fmt: skip
    """The bound on -log p of each row, in nats, with its standard error, (N,), on the CPU.

    `given` names the parts that are given and not scored, such as "a" or "a+b". `estimator` is
    as in `nll_bound`, by default "any_order", or "time" for a denoiser that uses the time. Row
    r is hidden by the stream (seed, r): the result does not depend on `batch_size`.

    Raises ConfigError for a batch_size below 1 and for unknown parts.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: need at least 1")
    device = model.device
    nats, stderr = torch.zeros(2, len(rows), dtype=torch.float64, device="cpu")
    for first in range(0, len(rows), batch_size):
        number = torch.arange(first, min(first + batch_size, len(rows)), device="cpu")
        batch = rows.batch(number, torch.zeros_like(number))
        model.space.check(batch.tokens, batch.valid, masks=False)
        may_hide = _may_hide(model, batch, given)
        bound = nll_bound(
            model.denoiser, batch.tokens.to(device), space=model.space,
            schedule=model.schedule, process=model.process,
            estimator=estimator or model.estimator,
            draws=draws, seed=seed, sample=number.to(device),
            may_hide=None if may_hide is None else may_hide.to(device),
            valid=None if batch.valid is None else batch.valid.to(device),
            cond={name: tensor.to(device) for name, tensor in batch.cond.items()} or None,
        )  # fmt: skip
        nats[number], stderr[number] = bound.nats.cpu(), bound.stderr.cpu()
        if progress is not None:
            progress(int(number[-1]) + 1, len(rows))
    return Bound(nats, stderr)


def of_items(bound: Bound, owner: Sequence[int], count: int) -> Bound:
    """The bound of each of `count` items: the sum over the rows that `owner` gives it."""
    nats = torch.zeros(count, dtype=torch.float64, device="cpu")
    variance = torch.zeros_like(nats)
    number = torch.tensor(owner, dtype=torch.int64, device="cpu")
    nats.index_add_(0, number, bound.nats)
    variance.index_add_(0, number, bound.stderr**2)
    return Bound(nats, variance.sqrt())


def _may_hide(model: Model, batch: Batch, given: str) -> Tensor | None:
    """The positions (B, L) that are scored: those of the batch outside the given parts."""
    if not given:
        return batch.may_hide
    if not model.space.parts:
        raise ConfigError(f"given={given!r}: this model's canvas has no parts")
    names = model.modality.part_names if isinstance(model.modality, HasParts) else ()
    free = hideable_positions(given, batch.tokens.shape[1], space=model.space, part_names=names)
    if batch.may_hide is None:
        return free.expand_as(batch.tokens)
    return free & batch.may_hide
