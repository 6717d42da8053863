"""Batch generation: from a file of requests to a file of results, over several runs.

A run that is started again makes only what is missing; another file, model or option is refused.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from mdiff.errors import BackendError, CheckpointError
from mdiff.files import complete, locate, locked, replace_file, staged, sweep, verify
from mdiff.modalities.text import read_bytes
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.engines import ATTEMPTS
from mdiff.pipeline.batch.plan import (
    REQUEST_ERRORS,
    Batch,
    Plan,
    Setting,
    agree,
    canvas_of,
    failure_of,
    model_digest,
    planned,
    runs_of,
)
from mdiff.pipeline.batch.requests import Failure, Request
from mdiff.pipeline.batch.runner import Report, make_all
from mdiff.pipeline.generation import Generated
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline
from mdiff.sampling import row_seeds

RESULTS, FAILURES = "results.jsonl", "failures.jsonl"


class Lines(NamedTuple):
    """The lines of a batch in the files of a shard."""

    results: str
    failures: str


@dataclass(frozen=True)
class RequestShard:
    """Batches of requests, and the directory of their results with its manifest of SHA-256 sums."""

    number: int
    batches: tuple[Batch, ...]
    path: Path

    def __str__(self) -> str:
        return f"shard {self.number}, {sum(map(len, self.batches))} requests"

    @property
    def count(self) -> int:
        """How many batches it has."""
        return len(self.batches)

    def is_complete(self) -> bool:
        """Whether its directory is there, with the sizes of files that its manifest lists."""
        return complete(self.path)

    def clear(self) -> None:
        """Remove what killed writers have left, and the directory where it is damaged."""
        sweep(self.path.parent, f"{self.path.name}.")
        if self.path.is_symlink() or self.path.is_file():
            # Not written by this job; the target of a link stays.
            self.path.unlink()
        elif self.path.exists():
            try:
                verify(self.path)
            except CheckpointError:
                shutil.rmtree(self.path)

    def item(self, number: int) -> Batch:
        """A batch: its requests go through the model together."""
        return self.batches[number]

    def split(self, item: Batch) -> Sequence[Batch]:
        """Each request of a batch by itself."""
        return [(request,) for request in item] if len(item) > 1 else ()

    def failure(self, item: Batch, how: str) -> Lines:
        """The failure of a single request."""
        error = f"{ATTEMPTS} workers crashed at it alone, the last by {how}"
        return Lines("", Failure(item[0].line, item[0].id, error).json())

    def write(self, results: Sequence[Lines]) -> None:
        """Write the lines; a directory that another process has written meanwhile stays."""
        try:
            with staged(self.path) as folder:
                for name, parts in zip((RESULTS, FAILURES), zip(*results)):
                    (folder / name).write_text("".join(parts), encoding="utf-8")
        except (CheckpointError, OSError):
            if not self.is_complete():
                raise


@dataclass(frozen=True)
class Generator:
    """Loads the model in a worker, on a `device` such as cpu or cuda; `setting` is the run's."""

    model: str
    dtype: str | None
    device: str
    mask_id: int | None
    setting: Setting
    special_tokens: str = "none"

    @property
    def gpus(self) -> int:
        """One for a model on CUDA."""
        return int(self.device.startswith("cuda"))

    def open(self, worker: int) -> Callable[[Batch], Lines]:
        """Load the model; of several GPUs each worker takes the next one."""
        device, gpus = self.device, torch.cuda.device_count()
        if device == "cuda" and gpus > 1:
            device = f"cuda:{worker % gpus}"
        pipeline = load(
            self.model, device=device, dtype=self.dtype, mask_id=self.mask_id,
            special_tokens=self.special_tokens,
        )  # fmt: skip
        return partial(make_batch, pipeline, self.setting)


def make_batch(pipeline: Pipeline, setting: Setting, batch: Batch) -> Lines:
    """The lines of a batch: of results, and of requests that fail."""
    results, failures = "", ""
    for request, found in filled(pipeline, batch, setting):
        if isinstance(found, Failure):
            failures += found.json()
        else:
            results += "".join(_lines(request, found))
    return Lines(results, failures)


def filled(
    pipeline: Pipeline, batch: Batch, setting: Setting
) -> Iterator[tuple[Request, list[Generated] | Failure]]:
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
            yield from filled(pipeline, (request,), setting)
        return
    for number, request in enumerate(batch):
        yield request, samples[number * setting.num_samples : (number + 1) * setting.num_samples]


def _samples(pipeline: Pipeline, batch: Batch, setting: Setting) -> list[Generated]:
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


@dataclass(frozen=True)
class Outcome:
    """The file of results, how many samples it holds, and the requests that failed."""

    results: Path
    samples: int
    failures: list[Failure]


def merge(plan: Plan, shards: Sequence[RequestShard], out: Path) -> Outcome:
    """Write the results in the order of the requests, and the failures.

    Every shard must be there. Only the offsets of a request's lines are kept in memory.
    """
    offsets: dict[str, list[tuple[Path, int, int]]] = {}
    failures = list(plan.failures)
    for shard in shards:
        path, offset = shard.path / RESULTS, 0
        with path.open("rb") as lines:
            for line in lines:
                key = json.dumps(json.loads(line)["id"])
                offsets.setdefault(key, []).append((path, offset, len(line)))
                offset += len(line)
        with (shard.path / FAILURES).open(encoding="utf-8") as failed:
            failures += [Failure(**json.loads(line)) for line in failed]
    failures.sort(key=lambda failure: failure.line)
    replace_file(out / FAILURES, (failure.json().encode() for failure in failures))
    ordered = (at for request in plan.requests for at in offsets.get(request.key, ()))
    replace_file(out / RESULTS, (_read(*at) for at in ordered))
    return Outcome(out / RESULTS, sum(map(len, offsets.values())), failures)


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def generate_offline(
    pipeline: Pipeline, requests: Path, out: Path, *, model: str, setting: Setting,
    dtype: str | None = None, device: str | None = None, mask_id: int | None = None,
    special_tokens: str = "none", division: Division | None = None,
    report: Report = lambda line: None,
) -> Outcome | None:  # fmt: skip
    """Every request of a JSONL file filled in, in `out`/results.jsonl.

    None where other processes have still to make their share. `model` is what `pipeline` was
    loaded from, a checkpoint of its own where training goes on: workers load it themselves, with
    `special_tokens` as it was. What is there of an earlier run is kept. Raises ConfigError for
    other requests, options or another model than it was begun with, CheckpointError while another
    process makes the same share, MdiffError where workers keep crashing; shards that are complete
    stay.
    """
    division = division or Division()
    folder = locate(model).folder
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    fixed: dict[str, object] = {
        "dtype": dtype, "device": on.partition(":")[0], "mask_id": mask_id,
    }  # fmt: skip
    if special_tokens != "none":
        fixed["special_tokens"] = special_tokens
    digest = model_digest(folder)
    plan = planned(pipeline, read_bytes(requests), setting, model=digest, fixed=fixed)
    shards = [
        RequestShard(number, batches, out / "shards" / f"shard-{number:06d}")
        for number, batches in enumerate(plan.shards)
    ]
    maker = Generator(str(folder.resolve()), dtype, on, mask_id, setting, special_tokens)
    with locked(out, division.share.lock):
        if division.share.count == 1:
            sweep(out)
        agree(plan.record, out, lines=plan.lines)
        make_all(shards, partial(make_batch, pipeline, setting), maker, division, report=report)
        if not all(shard.is_complete() for shard in shards):
            report(f"other shards of {out} are not complete yet: their processes go on")
            return None
        return merge(plan, shards, out)
