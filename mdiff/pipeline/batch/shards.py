"""Generation at volume, the shards: each is whole or not there, and all of them are one result.

A shard is a directory with a manifest of SHA-256 sums (see `checkpoint.staged`): one of its name
is complete whenever its writer was killed. Nothing that it holds depends on who makes it, or when.
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
from mdiff.pipeline.batch.jobs import Make, Tell
from mdiff.pipeline.batch.plan import BLAMED, Batches, Plan, Setting, canvas_of, failure_of, runs_of
from mdiff.pipeline.batch.requests import Failure, Request
from mdiff.pipeline.batch.workers import ATTEMPTS
from mdiff.pipeline.generation import Generated
from mdiff.pipeline.loading import load
from mdiff.pipeline.options import row_seeds
from mdiff.pipeline.pipeline import Pipeline

RESULTS, FAILURES = "results.jsonl", "failures.jsonl"
# The place after all batches: whoever dies there was not killed by a request.
WRITING = "writing"

# A request with its `n` samples, or with why it has none.
Found = tuple[Request, list[Generated] | Failure]


@dataclass(frozen=True)
class RequestShard:
    """Batches of requests and the directory of their results.

    Makers have died at the batches numbered in `apart`, whose requests are made one by one, and
    at the lone requests whose lines are in `fatal`, with how: these fail.
    """

    number: int
    batches: Batches
    path: Path
    apart: frozenset[int] = frozenset()
    fatal: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"shard {self.number}, {sum(map(len, self.batches))} requests"

    def is_whole(self) -> bool:
        """Whether its directory is there, with every file's size as its manifest says."""
        return complete(self.path)

    def clear(self) -> None:
        """Remove what killed makers have left, and the directory where it is damaged."""
        sweep(self.path.parent, f"{self.path.name}.")
        if self.path.is_symlink() or self.path.is_file():
            # Somebody put it there; what a link leads to stays.
            self.path.unlink()
        elif self.path.exists():
            try:
                verify(self.path)
            except CheckpointError:
                shutil.rmtree(self.path)

    def part(self) -> RequestShard:
        """Itself: requests are short."""
        return self

    def without(self, place: Hashable, how: str) -> RequestShard | None:
        """The same with the batch of a `Place` taken apart, or with its lone request failed."""
        if not isinstance(place, Place):
            return None
        if place.line is None:
            return replace(self, apart=self.apart | {place.batch})
        return replace(self, fatal=self.fatal | {place.line: how})


class Place(NamedTuple):
    """Where the making of a shard is: at a whole batch, or at the request of a line, alone."""

    batch: int
    line: int | None = None


@dataclass(frozen=True)
class Generator:
    """How a worker comes by a model: which one, loaded how; `setting` is the run's."""

    model: str
    dtype: str | None
    device: str | None
    mask_id: int | None
    setting: Setting

    def open(self, worker: int) -> Make:
        """Load the model; of several GPUs each worker takes the next one."""
        device, gpus = self.device, torch.cuda.device_count()
        if device is None and gpus > 1:
            device = f"cuda:{worker % gpus}"
        pipeline = load(self.model, device=device, dtype=self.dtype, mask_id=self.mask_id)
        return partial(make_shard, pipeline, self.setting)


def make_shard(pipeline: Pipeline, setting: Setting, shard: RequestShard, tell: Tell) -> None:
    """Generate a shard and put it in its place, whole; one that is there is left."""
    if shard.is_whole():
        return
    made: dict[int, list[Found]] = {}
    # Where makers have died comes first: if another does, nothing else was made in vain.
    for number in sorted(range(len(shard.batches)), key=lambda number: number not in shard.apart):
        made[number] = list(_batch(pipeline, setting, shard, number, tell))
    tell(WRITING)
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
        if not shard.is_whole():
            raise


def _batch(
    pipeline: Pipeline, setting: Setting, shard: RequestShard, number: int, tell: Tell
) -> Iterator[Found]:
    """What becomes of a batch: made as one, or request by request where makers died at it."""
    batch = shard.batches[number]
    if number not in shard.apart:
        tell(Place(number))
        yield from filled(pipeline, batch, setting)
        return
    for request in batch:
        if request.line in shard.fatal:
            how = f"{ATTEMPTS} workers died at it alone, the last by {shard.fatal[request.line]}"
            yield request, Failure(request.line, request.id, how)
        else:
            tell(Place(number, request.line))
            yield from filled(pipeline, [request], setting)


def filled(pipeline: Pipeline, batch: Sequence[Request], setting: Setting) -> Iterator[Found]:
    """Each request of a batch with its `n` samples; one that spoils the batch fails alone."""
    try:
        samples = _samples(pipeline, batch, setting)
    except BackendError:
        raise
    except BLAMED as error:
        if len(batch) == 1:
            yield batch[0], failure_of(batch[0], error)
            return
        for request in batch:
            yield from filled(pipeline, [request], setting)
        return
    for number, request in enumerate(batch):
        yield request, samples[number * setting.n : (number + 1) * setting.n]


def _samples(pipeline: Pipeline, batch: Sequence[Request], setting: Setting) -> list[Generated]:
    canvases, seeds = [], []
    for request in batch:
        canvases += [canvas_of(pipeline, request, setting)] * setting.n
        seeds += row_seeds(request.seed(setting.seed), setting.n).tolist()
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

    Every shard must be there. Only where a request's lines lie is kept in memory.
    """
    places: dict[str, list[tuple[Path, int, int]]] = {}
    failures = list(plan.failures)
    for shard in shards:
        path = shard.path / RESULTS
        offset = 0
        with path.open("rb") as lines:
            for line in lines:
                key = json.dumps(json.loads(line)["id"])
                places.setdefault(key, []).append((path, offset, len(line)))
                offset += len(line)
        with (shard.path / FAILURES).open(encoding="utf-8") as told:
            failures += [Failure(**json.loads(line)) for line in told]
    failures.sort(key=lambda failure: failure.line)
    replace_file(out / FAILURES, (failure.json().encode() for failure in failures))
    ordered = (place for request in plan.requests for place in places.get(request.key, ()))
    replace_file(out / RESULTS, (_at(*place) for place in ordered))
    return sum(map(len, places.values())), failures


def _at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
