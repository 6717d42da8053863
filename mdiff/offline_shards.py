"""Generation at volume, the shards: each is whole or not there, and all of them are one result.

A shard is a directory with a manifest of SHA-256 sums (see `checkpoint.staged`): one of its name
is complete whenever its writer was killed. Nothing that it holds depends on who makes it, or when.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from mdiff.checkpoint import complete, staged, verify
from mdiff.errors import BackendError, CheckpointError
from mdiff.generation import Generated
from mdiff.offline_plan import BLAMED, Plan, Setting, Shard, canvas_of, failure_of, runs_of
from mdiff.pipeline import Pipeline, row_seeds
from mdiff.request_lines import Failure, Request

RESULTS, FAILURES = "results.jsonl", "failures.jsonl"


def make_shard(pipeline: Pipeline, shard: Shard, setting: Setting, out: Path) -> None:
    """Generate a shard and put it in its place, whole; one that is there is left."""
    place = shard.place(out)
    if complete(place):
        return
    try:
        with (
            staged(place) as folder,
            (folder / RESULTS).open("w", encoding="utf-8") as results,
            (folder / FAILURES).open("w", encoding="utf-8") as failures,
        ):
            for batch in shard.batches:
                for request, made in filled(pipeline, batch, setting):
                    if isinstance(made, Failure):
                        failures.write(made.json())
                    else:
                        results.writelines(_lines(request, made))
    except (CheckpointError, OSError):
        # Another process was faster, with the same result.
        if not complete(place):
            raise


def filled(
    pipeline: Pipeline, batch: Sequence[Request], setting: Setting
) -> Iterator[tuple[Request, list[Generated] | Failure]]:
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


def sweep_shard(shard: Shard, out: Path) -> None:
    """Remove what killed writers of a shard have left; call it where nobody else writes it."""
    place = shard.place(out)
    for leftover in place.parent.glob(f".{place.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def missing(shards: Sequence[Shard], out: Path) -> list[Shard]:
    """The shards that are not there; what is left of killed writers and damaged ones is removed.

    For the one process that is to make them, with its lock in hand.
    """
    found = []
    for shard in shards:
        place = shard.place(out)
        sweep_shard(shard, out)
        if place.exists():
            try:
                verify(place)
                continue
            except CheckpointError:
                shutil.rmtree(place)
        found.append(shard)
    return found


def merge(plan: Plan, out: Path) -> tuple[int, list[Failure]]:
    """Write the results in the order of the requests, and the failures: how many, and which.

    Every shard must be there. Only where a request's lines lie is kept in memory.
    """
    places: dict[str, list[tuple[Path, int, int]]] = {}
    failures = list(plan.failures)
    for shard in plan.shards:
        path = shard.place(out) / RESULTS
        offset = 0
        with path.open("rb") as lines:
            for line in lines:
                key = json.dumps(json.loads(line)["id"])
                places.setdefault(key, []).append((path, offset, len(line)))
                offset += len(line)
        with (shard.place(out) / FAILURES).open(encoding="utf-8") as told:
            failures += [Failure(**json.loads(line)) for line in told]
    failures.sort(key=lambda failure: failure.line)
    _replace(out / FAILURES, (failure.json().encode() for failure in failures))
    ordered = (place for request in plan.requests for place in places.get(request.key, ()))
    _replace(out / RESULTS, (_at(*place) for place in ordered))
    return sum(map(len, places.values())), failures


def _at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _replace(path: Path, pieces: Iterator[bytes]) -> None:
    """Write a file beside its place, flush it to the disk and rename it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
