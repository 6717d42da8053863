"""The shards of batch generation, each written atomically, and the file of results made of them.

A shard is a directory with a manifest of SHA-256 sums (see `files.staged`): one of its name is
complete whenever its writer was killed. Its bytes do not depend on the process or the time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mdiff.errors import BackendError, CheckpointError
from mdiff.files import complete, replace_file, staged, sweep, verify
from mdiff.pipeline.batch.jobs import Heartbeat, Make
from mdiff.pipeline.batch.plan import (
    REQUEST_ERRORS,
    Batches,
    Plan,
    Setting,
    canvas_of,
    failure_of,
    runs_of,
)
from mdiff.pipeline.batch.requests import Failure, Request
from mdiff.pipeline.batch.workers import ATTEMPTS
from mdiff.pipeline.generation import Generated
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline
from mdiff.sampling import row_seeds

RESULTS, FAILURES = "results.jsonl", "failures.jsonl"
# The work item after all batches: no request is the cause of a crash there.
WRITING = "writing"

# A request with its samples, or with the failure.
Found = tuple[Request, list[Generated] | Failure]


@dataclass(frozen=True)
class RequestShard:
    """Batches of requests and the directory of their results.

    Workers have crashed at the batches numbered in `apart`, whose requests are made one by one,
    and at the single requests whose lines are in `fatal`, with how: these fail.
    """

    number: int
    batches: Batches
    path: Path
    apart: frozenset[int] = frozenset()
    fatal: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"shard {self.number}, {sum(map(len, self.batches))} requests"

    def is_complete(self) -> bool:
        """Whether its directory is there, with the sizes of files that its manifest lists."""
        return complete(self.path)

    def clear(self) -> None:
        """Remove what killed makers have left, and the directory where it is damaged."""
        sweep(self.path.parent, f"{self.path.name}.")
        if self.path.is_symlink() or self.path.is_file():
            # Not written by this job; the target of a link stays.
            self.path.unlink()
        elif self.path.exists():
            try:
                verify(self.path)
            except CheckpointError:
                shutil.rmtree(self.path)

    def part(self) -> RequestShard:
        """Itself: requests are short."""
        return self

    def without(self, item: Hashable, how: str) -> RequestShard | None:
        """The same with the requests of a batch made one by one, or with a request failed."""
        if not isinstance(item, WorkItem):
            return None
        if item.line is None:
            return replace(self, apart=self.apart | {item.batch})
        return replace(self, fatal=self.fatal | {item.line: how})


class WorkItem(NamedTuple):
    """What goes through the model at once: a batch, or the request of a line of it."""

    batch: int
    line: int | None = None


@dataclass(frozen=True)
class Generator:
    """Loads the model in a worker; `setting` is the run's."""

    model: str
    dtype: str | None
    device: str | None
    mask_id: int | None
    setting: Setting
    special_tokens: str = "none"

    def open(self, worker: int) -> Make:
        """Load the model; of several GPUs each worker takes the next one."""
        device, gpus = self.device, torch.cuda.device_count()
        if device is None and gpus > 1:
            device = f"cuda:{worker % gpus}"
        pipeline = load(
            self.model, device=device, dtype=self.dtype, mask_id=self.mask_id,
            special_tokens=self.special_tokens,
        )  # fmt: skip
        return partial(make_shard, pipeline, self.setting)


def make_shard(
    pipeline: Pipeline, setting: Setting, shard: RequestShard, heartbeat: Heartbeat
) -> None:
    """Generate a shard and write it atomically; one that is there is left."""
    if shard.is_complete():
        return
    made: dict[int, list[Found]] = {}
    # Batches of earlier crashes come first: another crash then costs no other batch.
    for number in sorted(range(len(shard.batches)), key=lambda number: number not in shard.apart):
        made[number] = list(_batch(pipeline, setting, shard, number, heartbeat))
    heartbeat(WRITING)
    try:
        with (
            staged(shard.path) as folder,
            (folder / RESULTS).open("w", encoding="utf-8") as results,
            (folder / FAILURES).open("w", encoding="utf-8") as failures,
        ):
            for number in range(len(shard.batches)):
                for request, found in made[number]:
                    if isinstance(found, Failure):
                        failures.write(found.json())
                    else:
                        results.writelines(_lines(request, found))
    except (CheckpointError, OSError):
        # Another process was faster, with the same result.
        if not shard.is_complete():
            raise


def _batch(
    pipeline: Pipeline, setting: Setting, shard: RequestShard, number: int, heartbeat: Heartbeat
) -> Iterator[Found]:
    """A batch, generated as one, or request by request where workers crashed at it."""
    batch = shard.batches[number]
    if number not in shard.apart:
        heartbeat(WorkItem(number))
        yield from filled(pipeline, batch, setting)
        return
    for request in batch:
        if request.line in shard.fatal:
            how = f"{ATTEMPTS} workers crashed at it alone, the last by {shard.fatal[request.line]}"
            yield request, Failure(request.line, request.id, how)
        else:
            heartbeat(WorkItem(number, request.line))
            yield from filled(pipeline, [request], setting)


def filled(pipeline: Pipeline, batch: Sequence[Request], setting: Setting) -> Iterator[Found]:
    """Each request of a batch with its samples; one that makes the batch fail, fails alone."""
    try:
        samples = _samples(pipeline, batch, setting)
    except BackendError:
        raise
    except REQUEST_ERRORS as error:
        if len(batch) == 1:
            yield batch[0], failure_of(batch[0], error)
            return
        for request in batch:
            yield from filled(pipeline, [request], setting)
        return
    for number, request in enumerate(batch):
        yield request, samples[number * setting.num_samples : (number + 1) * setting.num_samples]


def _samples(pipeline: Pipeline, batch: Sequence[Request], setting: Setting) -> list[Generated]:
    canvases, seeds = [], []
    for request in batch:
        canvases += [canvas_of(pipeline, request, setting)] * setting.num_samples
        seeds += row_seeds(request.seed(setting.seed), setting.num_samples).tolist()
    echo = batch[0].kind != "chat"
    runs = runs_of(pipeline, canvases, seeds, setting, echo=echo)
    return [sample for run in runs for sample in run.finished()]


def _lines(request: Request, samples: Sequence[Generated]) -> Iterator[str]:
    """The samples of a request as JSON lines; nothing in them depends on the clock."""
    for number, sample in enumerate(samples):
        found = {
            "id": request.id,
            "sample": number,
            "text": sample.output,
            "tokens": sample.tokens,
            "calls": sample.calls,
            "log_prob": sample.log_prob if math.isfinite(sample.log_prob) else None,
            "entropy": sample.entropy if math.isfinite(sample.entropy) else None,
            "seed": sample.seed,
        }
        yield json.dumps(found, ensure_ascii=False) + "\n"


def merge(plan: Plan, shards: Sequence[RequestShard], out: Path) -> tuple[int, list[Failure]]:
    """Write the results in the order of the requests, and the failures: how many, and which.

    Every shard must be there. Only the offsets of a request's lines are kept in memory.
    """
    offsets: dict[str, list[tuple[Path, int, int]]] = {}
    failures = list(plan.failures)
    for shard in shards:
        path = shard.path / RESULTS
        offset = 0
        with path.open("rb") as lines:
            for line in lines:
                key = json.dumps(json.loads(line)["id"])
                offsets.setdefault(key, []).append((path, offset, len(line)))
                offset += len(line)
        with (shard.path / FAILURES).open(encoding="utf-8") as lines:
            failures += [Failure(**json.loads(line)) for line in lines]
    failures.sort(key=lambda failure: failure.line)
    replace_file(out / FAILURES, (failure.json().encode() for failure in failures))
    ordered = (at for request in plan.requests for at in offsets.get(request.key, ()))
    replace_file(out / RESULTS, (_read(*at) for at in ordered))
    return sum(map(len, offsets.values())), failures


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
