"""How far a model's conditionals are from those of one joint: its likelihood under many orders."""

from __future__ import annotations

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.objective import maskable_positions
from mdiff.pipeline import Pipeline, Progress, Rows, bound_of_rows
from mdiff.tokens import Batch


class _Repeated:
    """The rows `chosen` (N,) int64 of `rows`, each `times` times one after another."""

    def __init__(self, rows: Rows, chosen: Tensor, times: int) -> None:
        self.rows, self.chosen = rows, chosen.repeat_interleave(times)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 of epochs `epoch` (B,)."""
        return self.rows.batch(self.chosen[rows], epoch)


def order_figures(
    pipeline: Pipeline, rows: Rows, *, orders: int, limit: int = 0, seed: int = 0,
    batch_size: int = 32, progress: Progress | None = None,
) -> dict[str, object]:  # fmt: skip
    """The spread of the exact log-likelihood over orders of the positions, in nats a token.

    -log p of a row under one order is its chain rule, one position a call, so a row of L tokens
    costs L (orders + 1) evaluations. Where the conditionals are those of one joint every order
    gives the same (Deriving LMs from MLMs, arXiv 2606.00997). `nats_per_token` is the mean over
    `orders` random ones, `spread` their standard deviation, `left_to_right` how much more that
    order has than their mean; each the mean over rows, with `_stderr` over them, None for one row.
    Of the rows `limit` are taken, evenly spaced (0: all). Nothing depends on `batch_size`.

    Raises ConfigError for fewer than 2 orders and for a denoiser that uses the time, DataError
    without rows.
    """
    if orders < 2:
        raise ConfigError(f"orders={orders}: need at least 2 for a spread")
    if pipeline.denoiser.uses_time:
        raise ConfigError("metric order: this denoiser uses the time, which an order does not name")
    if not len(rows):
        raise DataError("there is nothing to score: the data holds no token")
    count = min(limit or len(rows), len(rows))
    chosen = torch.arange(count, device="cpu") * len(rows) // count
    batch = rows.batch(chosen, torch.zeros_like(chosen))
    tokens = maskable_positions(
        batch.tokens, space=pipeline.space, may_hide=batch.may_hide, valid=batch.valid
    ).sum(1)

    def nats(estimator: str, times: int) -> Tensor:
        repeated = _Repeated(rows, chosen, times)
        found = bound_of_rows(
            pipeline, repeated, estimator=estimator, seed=seed, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        return found.nats.view(count, times) / tokens[:, None].clamp(min=1)

    each, in_turn = nats("random_order", orders), nats("left_to_right", 1)[:, 0]
    found: dict[str, object] = {"rows": count, "orders": orders, "tokens": int(tokens.sum())}
    for name, values in (
        ("nats_per_token", each.mean(1)), ("spread", each.std(1)),
        ("left_to_right", in_turn - each.mean(1)),
    ):  # fmt: skip
        found[name] = float(values.mean())
        found[f"{name}_stderr"] = float(values.std() / count**0.5) if count > 1 else None
    return found
