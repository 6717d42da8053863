"""The runner of work at volume: each shard once, whatever its workers and ranks do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time

import pytest
from toy_job import TIMEOUT, ToyMaker, ToyShard, job, journal, there
from volume_runs import ranked, server, started

from mdiff.errors import CheckpointError, ConfigError, DataError, MdiffError
from mdiff.files.atomic import locked
from mdiff.pipeline.batch import workers
from mdiff.pipeline.batch.volume import Launched, check_pool, make_all


@pytest.fixture(autouse=True)
def fast_workers(monkeypatch):
    context = server()
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda name: context)
    yield
    assert not multiprocessing.active_children()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


PLAIN = [("a",), ("b", "c"), (), ("d",), ("e",)]
WHOLE = {f"{i}.txt": " ".join(words) for i, words in enumerate(PLAIN)}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_shard_is_made_once_by_any_number_of_workers(out, count):
    said = []
    assert make_all(job(out, *PLAIN), Launched(), workers=count, report=said.append) == 5
    assert there(out) == WHOLE
    assert journal(out) == [0, 1, 2, 3, 4]
    assert sorted(line.partition(":")[0] for line in said) == [f"toy {i}" for i in range(5)]
    (out / "3.txt").unlink()
    assert make_all(job(out, *PLAIN), Launched(), workers=count, report=said.append) == 1
    assert journal(out) == [0, 1, 2, 3, 3, 4]
    assert said[-2:] == ["4 of 5 shards are there already", "toy 3: 1 of 1"]


def test_parts_are_cut_out_for_the_workers_at_hand_alone(out, monkeypatch):
    """The input of a shard may be large: there are never more parts than workers."""
    plain, about, most = ToyShard.part, set(), []

    def part(shard):
        about.add(shard.number)
        most.append(len(about))
        return plain(shard)

    monkeypatch.setattr(ToyShard, "part", part)
    pool = workers.WorkerPool(
        job(out, *[("a",)] * 9).shards, ToyMaker(), report=print,
        done=lambda shard: about.remove(shard.number),
    )  # fmt: skip
    pool.work(2)
    assert len(most) == 9
    assert max(most) <= 2


@pytest.mark.parametrize("word", ["kill once", "leave once"])
def test_the_shard_of_a_crashed_worker_is_made_by_the_next(out, word):
    make_all(job(out, ("a",), ("b", word), ("c",)), Launched(), workers=2)
    assert there(out) == {"0.txt": "a", "1.txt": f"b {word}", "2.txt": "c"}
    assert journal(out) == [0, 1, 1, 2]


def test_a_work_item_at_which_three_workers_crash_is_left_out_and_the_rest_made(out):
    said = []
    shards = job(out, ("a",), ("b", "kill", "c", "leave"), ("d",))
    make_all(shards, Launched(), workers=2, report=said.append)
    assert there(out) == {"0.txt": "a", "1.txt": "b c", "2.txt": "d"}
    assert journal(out) == [0, *[1] * 7, 2]
    lines = [line for line in said if "without the work item of the crash" in line]
    assert lines[0].startswith(
        "3 workers crashed at shard 1, the last by signal 9 (the system kill"
    )
    assert lines[1].startswith("3 workers crashed at shard 1, the last by exit code 7")


@pytest.mark.parametrize("word", ["hopeless", "unreported"])
def test_a_shard_without_a_way_around_is_given_up_after_the_others(out, word):
    lost = r"3 workers crashed at shard 1, the last by signal 9 .*; the other shards are complete"
    with pytest.raises(MdiffError, match=lost) as caught:
        make_all(job(out, ("a",), (word,), ("c",), ("d",)), Launched(), workers=2)
    assert caught.value.exit_code == 1
    assert there(out) == {"0.txt": "a", "2.txt": "c", "3.txt": "d"}
    assert journal(out) == [0, 1, 1, 1, 2, 3]


def test_workers_that_never_begin_end_the_run(out):
    with pytest.raises(MdiffError, match="3 workers crashed before a shard, the last by signal 9"):
        make_all(job(out, ("a",), ("b",), fails="kill"), Launched(), workers=2)
    assert there(out) == {}


def test_a_silent_worker_is_killed_and_one_that_reports_is_not(out):
    slow = [f"slow {i}" for i in range(7)]
    start = time.monotonic()
    make_all(job(out, ("a", "stop once"), slow), Launched(), workers=2, timeout=TIMEOUT)
    assert time.monotonic() - start > TIMEOUT
    assert there(out) == {"0.txt": "a stop once", "1.txt": " ".join(slow)}
    assert journal(out) == [0, 0, 1]


def test_a_work_item_that_hangs_is_left_out_by_a_single_worker_too(out):
    said = []
    make_all(job(out, ("hang", "a")), Launched(), timeout=TIMEOUT / 2, report=said.append)
    assert there(out) == {"0.txt": "a"}
    assert "the last by 1 s of silence" in said[0]


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("full", OSError, "No space left"),
        ("refuse", DataError, "no such word"),
        ("odd", MdiffError, "RuntimeError: odd"),
    ],
)
def test_what_a_worker_raises_ends_the_run_with_its_own_error(out, word, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make_all(job(out, ("a",), (word,), ("b",)), Launched(), workers=2)
    assert getattr(caught.value, "errno", None) == (errno.ENOSPC if word == "full" else None)


def test_an_error_while_a_model_is_loaded_is_the_workers_own(out):
    with pytest.raises(DataError, match="no such word"):
        make_all(job(out, ("a",), fails="refuse"), Launched(), workers=2)


@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupt_says_what_is_complete(out, count):
    def report(line):
        if ": 3 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="of 5 shards are complete; the same command"):
        make_all(job(out, *PLAIN), Launched(), workers=count, report=report)
    make_all(job(out, *PLAIN), Launched())
    assert there(out) == WHOLE


def as_rank(out, rank, world, **options):
    """One of a launcher's processes, from its start."""
    with ranked(rank, world):
        launched = Launched.here()
    with launched.held(out):
        make_all(job(out, *PLAIN), launched, **options)


def unlocked(out):
    return {name: text for name, text in WHOLE.items() if (out / name).read_text() == text}


@pytest.mark.parametrize("options", [{}, {"timeout": 60}])
def test_ranks_make_their_shares_and_the_first_waits_for_the_others(out, options):
    out.mkdir()
    processes = [started(as_rank, out, rank, 3, **options) for rank in (2, 0, 1)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert unlocked(out) == WHOLE
    assert {path.name for path in (out / ".ranks").iterdir()} <= {"1", "2"}


def test_the_first_rank_makes_what_one_left_that_never_came(out):
    out.mkdir()
    with locked(out / ".ranks" / "2"):
        first = started(as_rank, out, 0, 3)
        while not (out / "1.txt").exists():
            time.sleep(0.01)
        # Rank 2 is alive, as its lock says: its share is its own.
        time.sleep(0.5)
        assert not (out / "2.txt").exists()
    first.join(60)
    assert first.exitcode == 0
    assert unlocked(out) == WHOLE
    # One that comes late finds everything made.
    late = started(as_rank, out, 1, 3)
    late.join(60)
    assert late.exitcode == 0
    assert journal(out) == [0, 1, 2, 3, 4]


def test_a_second_first_rank_is_refused(out):
    with (
        locked(out),
        pytest.raises(CheckpointError, match=f"process {os.getpid()}"),
        Launched().held(out),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, None, Launched()), "workers=0"),
        ((2, None, Launched(0, 2)), "1 in each process of a launcher"),
        ((1, 0.0, Launched()), "timeout=0"),
        ((1, float("nan"), Launched()), "timeout=nan"),
        ((1, float("inf"), Launched()), "timeout=inf"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_pool(*arguments)


def test_a_launcher_with_an_invalid_environment_is_refused(monkeypatch):
    for rank, message in (("x", "whole numbers"), ("2", "expected less of both")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ConfigError, match=message):
            Launched.here()
