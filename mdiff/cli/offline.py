"""`mdiff generate --input FILE --out FOLDER` of text: at volume, over several runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import DataError

if TYPE_CHECKING:
    from mdiff.pipeline import Pipeline


def device_of(device: str | None, *, plans_only: bool) -> str | None:
    """Where this process loads the model: where it plans only, it leaves GPUs to workers."""
    from mdiff.pipeline.batch import Launched

    return "cpu" if plans_only else Launched.here().device(device)


def at_volume(
    pipeline: Pipeline, requests: Path, out: Path, *, model: str, n: int, length: int | None,
    options: dict[str, Any], dtype: str | None, device: str | None, mask_id: int | None,
    workers: int, patience: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Make what is missing in the folder; print where the results are.

    Raises DataError at the end where a request failed.
    """
    from mdiff.pipeline.batch import Setting, generate_offline

    rest = dict(options)
    setting = Setting(rest.pop("seed"), n, length, rest.pop("batch_size"), rest)
    start = time.monotonic()
    outcome = generate_offline(
        pipeline, requests, out, model=model, setting=setting, dtype=dtype, device=device,
        mask_id=mask_id, workers=workers, patience=patience, report=message,
    )  # fmt: skip
    if outcome is None:
        return
    failed = outcome.failures
    if as_json:
        told = {"samples": outcome.samples, "failed": len(failed)}
        result_json({"file": str(outcome.results)} | told)
    else:
        result(str(outcome.results))
    message(f"{time.monotonic() - start:.1f} s in this run")
    if failed:
        first = failed[0]
        raise DataError(
            f"{len(failed)} requests failed, see {outcome.results.with_name('failures.jsonl')}; "
            f"line {first.line}: {first.error}"
        )
