"""Generation at volume: a file of requests in, their results out, over several runs.

Started again, a run makes only what is missing; another file, model or option is refused. Several
processes share the work: those of this call, or those that a launcher has started.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mdiff.checkpoint import complete, locked, sweep
from mdiff.errors import BackendError, CheckpointError, ConfigError
from mdiff.offline_plan import PLAN, Plan, Setting, Shard, agree, model_digest, planned, write_plan
from mdiff.offline_shards import RESULTS, make_shard, merge, missing
from mdiff.offline_workers import Work, one_thread, share
from mdiff.pipeline import Pipeline
from mdiff.request_lines import Failure
from mdiff.sources import read_bytes

# Seconds between two looks at what other processes do, and how long they have to begin.
LOOK_EVERY = 0.2
BEGIN_WITHIN = 600.0

Report = Callable[[str], None]


@dataclass(frozen=True)
class Launched:
    """Which of a launcher's processes this is, as torchrun and accelerate say it."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Launched:
        """As the environment says; the only one where it says nothing."""
        try:
            found = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError:
            raise ConfigError("RANK and WORLD_SIZE: expected whole numbers") from None
        if not 0 <= found.rank < found.world:
            raise ConfigError(f"RANK={found.rank}, WORLD_SIZE={found.world}: expected less of both")
        return found

    def device(self, device: str | None) -> str | None:
        """The device to load on: of several processes on a machine each has a GPU of its own."""
        gpus = torch.cuda.device_count()
        if device is not None or self.world == 1 or not gpus:
            return device
        return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % gpus}"


@dataclass(frozen=True)
class Outcome:
    """What is there at the end: samples, the file that holds them, and the requests that failed."""

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
    report: Report = lambda line: None,
) -> Outcome | None:
    """Every request of a JSONL file filled in, in `out`/results.jsonl; None in later ranks.

    `model` is what `pipeline` was loaded from: workers load it themselves. What is there of an
    earlier run is kept. Raises ConfigError for other requests, options or another model than it
    was begun with, CheckpointError while another process writes there, MdiffError where workers
    keep dying; shards that are complete stay.
    """
    launched = Launched.here()
    if workers < 1 or (workers > 1 and launched.world > 1):
        raise ConfigError(
            f"workers={workers}: expected at least 1, and 1 in each process of a launcher"
        )
    folder = Path(model).expanduser()
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    told = {"dtype": dtype, "device": (device or usual).partition(":")[0], "mask_id": mask_id}
    plan = planned(
        pipeline, read_bytes(requests), setting, model=model_digest(model), told=told
    )  # fmt: skip
    named = str(folder) if folder.is_dir() else model
    work = Work(named, dtype, device, mask_id, setting, out)
    with _held(out, launched):
        _begin(plan, out, launched)
        mine = plan.shards[launched.rank :: launched.world]
        try:
            _make(pipeline, mine, work, workers=workers, report=report)
            if launched.rank:
                return None
            for rank in range(1, launched.world):
                _await(pipeline, plan, work, replace(launched, rank=rank), report)
        except KeyboardInterrupt:
            done = sum(complete(shard.place(out)) for shard in plan.shards)
            raise KeyboardInterrupt(
                f"interrupted: {done} of {len(plan.shards)} shards are complete; "
                "the same command goes on"
            ) from None
        return Outcome(out / RESULTS, *merge(plan, out))


def _make(
    pipeline: Pipeline, shards: Sequence[Shard], work: Work, *, workers: int, report: Report
) -> None:
    """Make what is missing of these shards, here or with workers."""
    left = missing(shards, work.out)
    if len(left) < len(shards):
        report(f"{len(shards) - len(left)} of {len(shards)} shards are there already")
    finished = 0

    def done(shard: Shard) -> None:
        nonlocal finished
        finished += 1
        requests = sum(map(len, shard.batches))
        report(f"shard {shard.number}, {requests} requests: {finished} of {len(left)}")

    if workers > 1:
        share(left, work, workers=min(workers, max(1, len(left))), done=done)
        return
    with one_thread():
        for shard in left:
            make_shard(pipeline, shard, work.setting, work.out)
            done(shard)


@contextmanager
def _held(out: Path, launched: Launched) -> Iterator[None]:
    """The lock of a rank: the first has the folder's, another its own, which it may wait for."""
    end = time.monotonic() + (BEGIN_WITHIN if launched.rank else 0)
    with ExitStack() as stack:
        while not _taken(stack, _room(out, launched.rank), end):
            time.sleep(LOOK_EVERY)
        yield


def _taken(stack: ExitStack, room: Path, end: float) -> bool:
    """Whether the lock of a directory was free; after the time `end` CheckpointError if not."""
    try:
        stack.enter_context(locked(room))
    except CheckpointError:
        if time.monotonic() >= end:
            raise
        return False
    return True


def _room(out: Path, rank: int) -> Path:
    """Where a rank's lock lies: the folder itself, or a hidden one in it."""
    return out / ".ranks" / str(rank) if rank else out


def _begin(plan: Plan, out: Path, launched: Launched) -> None:
    """See that the folder has this plan: the first rank writes it, the others wait for it."""
    end = time.monotonic() + BEGIN_WITHIN
    while launched.rank and not (out / PLAN).exists():
        if time.monotonic() > end:
            raise BackendError(f"{out}: the first process wrote no plan in {BEGIN_WITHIN:.0f} s")
        time.sleep(LOOK_EVERY)
    if launched.rank == 0:
        sweep(out)
    if not agree(plan, out):
        write_plan(plan, out)


def _await(pipeline: Pipeline, plan: Plan, work: Work, other: Launched, report: Report) -> None:
    """Wait for another rank's shards; what it leaves behind when it dies is made here."""
    shards = plan.shards[other.rank :: other.world]
    while not all(complete(shard.place(work.out)) for shard in shards):
        with ExitStack() as stack:
            if _taken(stack, _room(work.out, other.rank), math.inf):
                _make(pipeline, shards, work, workers=1, report=report)
        time.sleep(LOOK_EVERY)
