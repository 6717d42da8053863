"""`mdiff generate --input FILE --out FOLDER` of text: batch generation over several runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import DataError

if TYPE_CHECKING:
    from mdiff.pipeline import CallOptions, Pipeline


def device_of(device: str | None, *, plans_only: bool) -> str | None:
    """The device for the model of this process; "cpu" where only its workers generate."""
    from mdiff.pipeline.batch import Launched

    return "cpu" if plans_only else Launched.here().device(device)


def generate_at_volume(
    pipeline: Pipeline, requests: Path, out: Path, *, model: str, num_samples: int,
    length: int | None, max_new_tokens: int | None, seed: int, batch_size: int,
    options: CallOptions, dtype: str | None, device: str | None, mask_id: int | None,
    workers: int, timeout: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Generate what is missing in the folder; print the path of the results.

    Raises DataError at the end where a request failed.
    """
    from mdiff.pipeline.batch import Setting, generate_offline

    rest = options.copy()
    del rest["seed"], rest["batch_size"]
    setting = Setting(
        seed=seed, num_samples=num_samples, length=length, max_new_tokens=max_new_tokens,
        batch_size=batch_size, options=rest,
    )  # fmt: skip
    start = time.monotonic()
    outcome = generate_offline(
        pipeline, requests, out, model=model, setting=setting, dtype=dtype, device=device,
        mask_id=mask_id, workers=workers, timeout=timeout, report=message,
    )  # fmt: skip
    if outcome is None:
        return
    failed = outcome.failures
    if as_json:
        counts = {"samples": outcome.samples, "failed": len(failed)}
        result_json({"file": str(outcome.results), **counts})
    else:
        result(str(outcome.results))
    message(f"{time.monotonic() - start:.1f} s in this run")
    if failed:
        first = failed[0]
        raise DataError(
            f"{len(failed)} requests failed, see {outcome.results.with_name('failures.jsonl')}; "
            f"line {first.line}: {first.error}"
        )
