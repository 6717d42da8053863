"""The runner: each shard is made once, whatever its workers do."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import random
import sys
import time

import pytest
from toy_job import TIMEOUT, ToyShard, journal, run, there
from volume_runs import server

from mdiff.errors import BackendError, ConfigError, DataError, MdiffError
from mdiff.pipeline.batch import engines
from mdiff.pipeline.batch.division import Division, Share
from mdiff.pipeline.batch.engines import ATTEMPTS


@pytest.fixture(autouse=True)
def fast_workers(monkeypatch):
    context = server()
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)
    yield
    assert not multiprocessing.active_children()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


PLAIN = [("a",), ("b", "c"), ("d",), ("e",), ("f",)]
WHOLE = {f"{i}.txt": " ".join(words) for i, words in enumerate(PLAIN)}
SIGNAL = "signal 9 (the system kills so where memory runs out)"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_item_is_made_once_by_any_number_of_workers(out, workers):
    said = []
    assert run(out, *PLAIN, workers=workers, report=said.append) == 5
    assert there(out) == WHOLE
    assert journal(out) == ["0 a", "1 b", "1 c", "2 d", "3 e", "4 f"]
    assert sorted(line.partition(":")[0] for line in said) == [f"toy {i}" for i in range(5)]
    (out / "3.txt").unlink()
    assert run(out, *PLAIN, workers=workers, report=said.append) == 1
    assert said[-2:] == ["4 of 5 shards are there already", "toy 3: 1 of 1"]
    assert there(out) == WHOLE


def test_items_are_asked_for_when_a_worker_is_free(out, monkeypatch):
    """The input of an item may be large: there are never more of them than workers."""
    plain, most = ToyShard.item, []

    def item(shard, number):
        most.append(shard.number - len(there(out)) + 1)
        return plain(shard, number)

    monkeypatch.setattr(ToyShard, "item", item)
    run(out, *[("a",)] * 9, workers=2)
    assert len(most) == 9
    assert max(most) <= 2


@pytest.mark.parametrize("word", ["kill once", "leave once"])
def test_the_item_of_a_crashed_worker_is_made_by_another(out, word):
    run(out, ("a",), ("b", word), ("c",), workers=2)
    assert there(out) == {"0.txt": "a", "1.txt": f"b {word}", "2.txt": "c"}
    assert journal(out).count(f"1 {word}") == 2


def test_an_item_that_crashes_its_workers_is_found_alone_and_the_rest_is_made(out):
    said = []
    shards = [("a",), ("b", "kill", "c", "leave"), ("d",)]
    run(out, *shards, workers=2, report=said.append)
    assert there(out) == {"0.txt": "a", "1.txt": f"b ({SIGNAL}) c (exit code 7)", "2.txt": "d"}
    for word in ("kill", "leave"):
        # Once or twice beside another item, and then alone.
        assert ATTEMPTS <= journal(out).count(f"1 {word}") <= ATTEMPTS + 2
    assert [line for line in said if "crashed at an item of toy 1, " in line]


def test_an_item_of_several_parts_is_made_part_by_part(out):
    run(out, ("a", "b+kill+c", "d"), ("e",), workers=2)
    assert there(out) == {"0.txt": f"a b ({SIGNAL}) c d", "1.txt": "e"}


def test_a_shard_without_a_way_around_is_given_up_after_the_others(out):
    lost = r"3 workers crashed at an item of toy 1, the last by signal 9 .*; the other shards"
    with pytest.raises(MdiffError, match=lost) as caught:
        run(out, ("a",), ("hopeless",), ("c",), ("d",), workers=2)
    assert caught.value.exit_code == 1
    assert there(out) == {"0.txt": "a", "2.txt": "c", "3.txt": "d"}


def test_workers_that_never_have_a_model_end_the_run(out, tmp_path):
    with pytest.raises(MdiffError, match="3 workers crashed before a shard, the last by signal 9"):
        run(out, ("a",), ("b",), fails="kill", workers=2)
    assert there(out) == {}
    run(out, ("a",), ("b",), fails="kill once", pids=tmp_path / "pids", workers=1, timeout=60)
    assert there(out) == {"0.txt": "a", "1.txt": "b"}


def test_a_silent_worker_is_killed_and_one_that_answers_is_not(out):
    start = time.monotonic()
    slow = [f"slow {i}" for i in range(14)]
    run(out, ("a", "stop once"), slow, workers=2, timeout=TIMEOUT)
    assert time.monotonic() - start > TIMEOUT
    assert there(out) == {"0.txt": "a stop once", "1.txt": " ".join(slow)}
    # Those that were being made when the silent one was killed are made again.
    assert len(journal(out)) <= 16 + 2


def test_an_item_that_hangs_is_named_by_a_single_worker_too(out):
    run(out, ("hang", "a"), timeout=TIMEOUT / 4)
    assert there(out) == {"0.txt": "(0.5 s of silence) a"}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("full", OSError, "No space left"),
        ("refuse", DataError, "no such word"),
        ("odd", Exception, "odd"),
    ],
)
def test_what_an_item_raises_ends_the_run_with_its_own_error(out, workers, word, kind, message):
    with pytest.raises(kind, match=message) as caught:
        run(out, ("a",), (word,), ("b",), workers=workers)
    assert getattr(caught.value, "errno", None) == (errno.ENOSPC if word == "full" else None)


def test_an_error_while_a_model_is_loaded_is_the_workers_own(out):
    with pytest.raises(DataError, match="no such word"):
        run(out, ("a",), fails="refuse", workers=2)


def test_workers_have_numbers_in_a_row(out, tmp_path):
    """Of several GPUs each takes the next."""
    run(out, *[("slow",)] * 6, pids=tmp_path / "pids", workers=3)
    numbers = sorted(int(line.split()[1]) for line in (tmp_path / "pids").open())
    assert numbers == list(range(numbers[0], numbers[0] + 3))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupt_says_what_is_complete(out, workers):
    def report(line):
        if ": 3 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="3 of 5 shards are complete; the same command"):
        run(out, *PLAIN, workers=workers, report=report)
    run(out, *PLAIN)
    assert there(out) == WHOLE


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_and_make_all_shards_in_any_order(out, count):
    shares = [Share(number, count) for number in range(1, count + 1)]
    random.Random(count).shuffle(shares)
    assert sum(run(out, *PLAIN, share=share) for share in shares) == 5
    assert there(out) == WHOLE
    assert len(journal(out)) == 6
    assert len({share.lock for share in shares}) == count


@pytest.mark.parametrize(
    "written",
    ["9/8", "0/8", "8", "3/", "/8", "a/b", "-1/8", "1/0", "0/0", "1/2/3", "1.0/2", "", " 1/2",
     "+1/2", "1/-2", "99999999999/99999999999", "³/8", "1/2\n", "nan/inf"],
)  # fmt: skip
def test_a_share_that_is_none_is_refused(written):
    with pytest.raises(ConfigError, match="expected K/N with K from 1 to N"):
        Share.of(written)


def test_the_share_of_a_launchers_process_is_that_of_its_rank(monkeypatch):
    assert Share.of(None) == Share.of("1/1") == Share()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert Share.of(None) == Share(rank + 1, 3)
        assert Share.of("2/9") == Share(2, 9)
    for rank, world in (("3", "3"), ("x", "3"), ("0", "x"), ("-1", "3"), ("", "3")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ConfigError, match="RANK"):
            Share.of(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": -1}, "workers=-1"),
        ({"timeout": 0.0}, "timeout=0"),
        ({"timeout": -5.0}, "timeout=-5"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"engine": "rays"}, "did you mean 'ray'"),
        ({"engine": "dask"}, "known: local, ray"),
        ({"address": "auto"}, "is for --engine ray"),
    ],
)
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Division(**options)


def test_an_engine_that_is_not_installed_is_named(out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"ray is not installed.*mdiff-toolkit\[ray\]"):
        run(out, ("a",), engine="ray")


def generated(seed):
    """Shards with crashes and hangs at random positions, and the files that they become."""
    chance = random.Random(seed)
    endings = {"kill": f"({SIGNAL})", "leave": "(exit code 7)", "kill once": "kill once"}
    shards, whole = [], {}
    for number in range(chance.randint(1, 5)):
        words = [chance.choice(["a", "b", "c", "d", *endings]) for _ in range(chance.randint(1, 4))]
        joined = [chance.choice(" +") for _ in words[1:]]
        text = "".join(itertools.chain(*zip(words, [*joined, ""])))
        shards.append(tuple(part for part in _parts(words, joined)))
        whole[f"{number}.txt"] = " ".join(endings.get(word, word) for word in words)
        assert text
    return shards, whole


def _parts(words, joined):
    """Items of words that are joined by "+"."""
    item = words[0]
    for word, how in zip(words[1:], joined):
        if how == "+":
            item += f"+{word}"
        else:
            yield item
            item = word
    yield item


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_whatever_crashes_the_files_are_the_same(out, seed):
    shards, whole = generated(seed)
    run(out, *shards, workers=1 + seed % 3, timeout=60.0)
    assert there(out) == whole
    bad = sum(word in ("kill", "leave") for s in shards for i in s for word in i.split("+"))
    items = sum(len(item.split("+")) + 1 for shard in shards for item in shard)
    # Bounded: each item is made a few times for each crash of another one.
    assert len(journal(out)) <= items * (1 + ATTEMPTS) + 3 * ATTEMPTS * bad
