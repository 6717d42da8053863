"""Metric order of `mdiff eval`: its defaults, and its line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mdiff.cli.views.console import message, result

if TYPE_CHECKING:
    from mdiff.pipeline import Pipeline, Rows

# It costs an evaluation for each token and order: by default few rows and, of text, short ones.
ORDERS, TEXT_ROWS, PICTURE_ROWS, ROW_LENGTH = 8, 8, 4, 32


def of_orders(
    pipeline: Pipeline, rows: Rows, *, orders: int, limit: int, seed: int, batch_size: int
) -> dict[str, object]:
    """The figures of the metric; progress goes to stderr."""
    from mdiff.evaluation import order_figures

    return order_figures(
        pipeline, rows, orders=orders, limit=limit, seed=seed, batch_size=batch_size,
        progress=lambda done, of: message(f"{done} of {of} rows, each in one order"),
    )  # fmt: skip


def order_table(report: Mapping[str, Any]) -> None:
    """The line of metric order, where it is asked for."""
    if "order" not in report:
        return
    found = report["order"]
    mean, spread, turn = (
        f"{found[name]:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}")
        for name in ("nats_per_token", "spread", "left_to_right")
        for error in (found[f"{name}_stderr"],)
    )
    rows, by = f"each of {found['rows']} rows", "95 % over rows"
    if found["rows"] == 1:
        rows, by = "one row", "one row shows no error"
    result(
        f"order: {mean} nats a token over {found['orders']} random orders of {rows}, "
        f"{found['tokens']:,} tokens; standard deviation over orders {spread}; "
        f"left to right less their mean {turn} ({by})"
    )
