"""Kill -9 amid generation and encoding at volume: the result is that of one clean run.

A trial kills a run, or one of its workers, at a random moment: after so many new shards as a
fixed seed says and some milliseconds, so that it lands within the work on a slow machine too.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from figures import record
from volume_runs import (
    asked,
    begin,
    content,
    encode,
    results,
    started,
    tiny_model,
    tiny_pictures,
    written,
)

from mdiff.modalities.image.codec import save_codec
from mdiff.modalities.image.codecs.kmeans import kmeans

PICTURES = 160
# This share of the kills comes within so many seconds of the start, about when work begins.
AT_THE_START, BEGUN_AFTER = 0.2, 0.3
# The others come within so many seconds after the last shard that was waited for.
LATER = 0.02
WAITED_AT_MOST = 120.0


@dataclass(frozen=True)
class Work:
    """What is done over and over: `task(*arguments, out)`, its shards, and a clean run's folder."""

    task: Any
    arguments: tuple[Any, ...]
    pattern: str
    clean: Path

    def shards(self, out: Path) -> set[str]:
        return {path.relative_to(out).as_posix() for path in out.glob(self.pattern)}


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("encoding")
    save_codec(kmeans(codebook_size=8).fit(tiny_pictures(PICTURES).pixels), folder / "codec")
    encode(folder / "codec", PICTURES, folder / "clean", workers=1)
    arguments = (folder / "codec", PICTURES)
    return Work(encode, arguments, "shard-*", folder / "clean")


@pytest.fixture(scope="module")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("generation")
    model, requests = tiny_model(folder / "tiny"), written(folder / "in.jsonl", asked())
    begin(model, requests, folder / "clean")
    return Work(begin, (model, requests), "shards/shard-*", folder / "clean")


def killed_often(work: Work, tmp_path: Path, trials: int, *, seed: int) -> dict[str, int]:
    """Kill runs in one folder after another, and see that nothing is lost; what was met."""
    chance, clean = random.Random(seed), content(work.clean)
    all_shards = work.shards(work.clean)
    kinds = ("trials", "amid the shards", "within a write", "workers alone", "folders finished")
    met = Counter(dict.fromkeys(kinds, 0))
    out = tmp_path / "0"
    while met["trials"] < trials:
        workers, before = chance.choice((1, 2)), work.shards(out)
        pids = tmp_path / "pids"
        pids.write_text("")
        process = started(work.task, *work.arguments, out, workers=workers, pids=str(pids))
        if chance.random() < AT_THE_START:
            time.sleep(chance.uniform(0, BEGUN_AFTER))
        else:
            # A fourth of what is left, so that there are several kills in a folder.
            left = len(all_shards) - len(before)
            wait_for_shards(work, out, len(before) + chance.randint(1, 1 + left // 4), process)
            time.sleep(chance.uniform(0, LATER))
        alone = workers == 2 and chance.random() < 0.5 and killed_worker(pids)
        if alone:
            # The run is to go on by itself, and end.
            process.join(WAITED_AT_MOST)
            assert process.exitcode == 0
            met["workers alone"] += 1
        elif process.exitcode is None:
            process.kill()
            process.join()
        there = work.shards(out)
        if alone or process.exitcode < 0:
            met["trials"] += 1
            met["amid the shards"] += alone or before < there < all_shards
        whole = content(out) if out.exists() else {}
        met["within a write"] += any(".tmp" in name for name in whole)
        for name, held in whole.items():
            # A shard that is there is whole, and so is whatever else has its own name.
            if not any(part.startswith(".") for part in Path(name).parts):
                assert held == clean[name], name
        if process.exitcode == 0:
            assert whole == clean
            met["folders finished"] += 1
            out = tmp_path / str(met["folders finished"])
    last = started(work.task, *work.arguments, out, workers=2)
    last.join(WAITED_AT_MOST)
    assert last.exitcode == 0
    assert content(out) == clean
    return dict(met)


def wait_for_shards(work: Work, out: Path, count: int, process: Any) -> None:
    """Look again and again until so many shards are there, or the process has ended."""
    end = time.monotonic() + WAITED_AT_MOST
    while process.exitcode is None and len(work.shards(out)) < count:
        assert time.monotonic() < end
        time.sleep(0.002)


def killed_worker(pids: Path) -> bool:
    """Kill one of the workers that have been started; whether there was one to kill."""
    for pid in map(int, pids.read_text().split()):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        return True
    return False


def test_8_kills_of_encoding_leave_the_folder_of_one_clean_run(encoding, tmp_path):
    met = killed_often(encoding, tmp_path, 8, seed=53)
    record("kills of encoding, short", met)
    assert met["amid the shards"] > 3
    assert met["workers alone"] > 0


def test_3_kills_of_generation_leave_the_folder_of_one_clean_run(generation, tmp_path):
    met = killed_often(generation, tmp_path, 3, seed=12)
    record("kills of generation at volume, short", met)
    assert met["amid the shards"] > 0


@pytest.mark.faults
def test_200_kills_of_encoding_leave_the_folder_of_one_clean_run(encoding, tmp_path):
    record("kills of encoding", killed_often(encoding, tmp_path, 200, seed=13))


@pytest.mark.faults
def test_50_kills_of_generation_leave_the_folder_of_one_clean_run(generation, tmp_path):
    record("kills of generation at volume", killed_often(generation, tmp_path, 50, seed=14))


@pytest.mark.faults
def test_generation_killed_ten_times_in_one_folder_is_one_clean_run(generation, tmp_path):
    model, chance, kills = generation.arguments[0], random.Random(15), 0
    # About 60 shards, of which a kill leaves a few new ones.
    rows = [{"id": i, "prompt": "ab " * (i % 4), "length": 24 + i % 12} for i in range(180)]
    requests, out = written(tmp_path / "in.jsonl", rows), tmp_path / "out"
    begin(model, requests, tmp_path / "clean")
    for _ in range(10):
        before = len(generation.shards(out))
        process = started(begin, model, requests, out, workers=2)
        wait_for_shards(generation, out, before + 1, process)
        time.sleep(chance.uniform(0, LATER))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills == 10
    begin(model, requests, out)
    assert content(out) == content(tmp_path / "clean")
    assert [row["id"] for row in results(out)] == list(range(180))
    record("kills of generation in one folder", {"kills": kills})
