"""Batch generation: from a file of requests to a file of results, over several runs.

A run that is started again makes only what is missing; another file, model or option is refused.
`volume` divides the work among processes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mdiff.errors import BackendError
from mdiff.files import locate, sweep
from mdiff.modalities.text import read_bytes
from mdiff.pipeline.batch.jobs import Job, Report
from mdiff.pipeline.batch.plan import PLAN, Plan, Setting, agree, model_digest, planned, write_plan
from mdiff.pipeline.batch.requests import Failure
from mdiff.pipeline.batch.shards import RESULTS, Generator, RequestShard, make_shard, merge
from mdiff.pipeline.batch.volume import POLL_EVERY, Launched, check_pool, make_all
from mdiff.pipeline.pipeline import Pipeline

SHARDS = "shards"
# Seconds that the first process of a launcher has to write the plan.
BEGIN_WITHIN = 600.0


@dataclass(frozen=True)
class Outcome:
    """The file of results, how many samples it holds, and the requests that failed."""

    results: Path
    samples: int
    failures: list[Failure]


def generate_offline(
    pipeline: Pipeline,
    requests: Path,
    out: Path,
    *,
    model: str,
    setting: Setting,
    dtype: str | None = None,
    device: str | None = None,
    mask_id: int | None = None,
    workers: int = 1,
    timeout: float | None = None,
    special_tokens: str = "none",
    report: Report = lambda line: None,
) -> Outcome | None:
    """Every request of a JSONL file filled in, in `out`/results.jsonl; None in later ranks.

    `model` is what `pipeline` was loaded from, a checkpoint of its own where training goes on:
    workers load it themselves, with `special_tokens` as it was, and `timeout` is how many seconds
    one may take for a batch (see `volume.make_all`). What is there of an earlier run is kept.
    Raises ConfigError for other requests, options or another model than it was begun with,
    CheckpointError while another process writes there, MdiffError where workers keep crashing;
    shards that are complete stay.
    """
    launched = Launched.here()
    check_pool(workers, timeout, launched)
    folder = locate(model).folder
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    fixed: dict[str, object] = {
        "dtype": dtype, "device": (device or usual).partition(":")[0], "mask_id": mask_id,
    }  # fmt: skip
    if special_tokens != "none":
        fixed["special_tokens"] = special_tokens
    digest = model_digest(folder)
    plan = planned(pipeline, read_bytes(requests), setting, model=digest, fixed=fixed)
    shards = [
        RequestShard(number, batches, out / SHARDS / f"shard-{number:06d}")
        for number, batches in enumerate(plan.shards)
    ]
    maker = Generator(str(folder), dtype, launched.device(device), mask_id, setting, special_tokens)
    job = Job(shards, partial(make_shard, pipeline, setting), maker, out)
    with launched.held(out):
        _begin(plan, out, launched)
        make_all(job, launched, workers=workers, timeout=timeout, report=report)
        if launched.rank:
            return None
        return Outcome(out / RESULTS, *merge(plan, shards, out))


def _begin(plan: Plan, out: Path, launched: Launched) -> None:
    """Check that the folder has this plan: the first rank writes it, the others wait for it."""
    end = time.monotonic() + BEGIN_WITHIN
    while launched.rank and not (out / PLAN).exists():
        if time.monotonic() > end:
            raise BackendError(f"{out}: the first process wrote no plan in {BEGIN_WITHIN:.0f} s")
        time.sleep(POLL_EVERY)
    if launched.rank == 0:
        sweep(out)
    if not agree(plan, out):
        write_plan(plan, out)
