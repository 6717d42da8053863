"""Generation at volume: the bits of one run, whatever the order, shares and crashes."""

from __future__ import annotations

import json
import os
import random

import pytest
from volume_runs import (
    DEADLY,
    SETTING,
    DeadlyGenerator,
    asked,
    begin,
    content,
    results,
    server,
    started,
    written,
)  # fmt: skip

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files.atomic import locked
from mdiff.pipeline.batch import engines, offline, plan
from mdiff.pipeline.batch.division import Share
from mdiff.pipeline.batch.plan import Setting


@pytest.fixture
def fast_workers(monkeypatch):
    context = server()
    monkeypatch.setattr(engines.multiprocessing, "get_context", lambda name: context)


def test_there_is_one_result_a_request_in_the_order_of_the_file(clean, requests):
    asked = [json.loads(line) for line in requests.open()]
    found = results(clean)
    assert [row["id"] for row in found] == [row.get("id", 60) for row in asked]
    assert len({row["seed"] for row in found}) == 60
    assert found[-1]["seed"] == -1
    assert all(row["text"].startswith(ask["prompt"]) for row, ask in zip(found, asked[:48]))
    assert (clean / "failures.jsonl").read_bytes() == b""
    assert len(list((clean / "shards").iterdir())) == 20


def test_the_same_command_again_makes_nothing(clean, model, requests):
    before = {path: path.stat().st_mtime_ns for path in (clean / "shards").rglob("*")}
    was, said = content(clean), []
    begin(model, requests, clean, report=said.append)
    assert said == ["20 of 20 shards are there already"]
    assert content(clean) == was
    assert {path: path.stat().st_mtime_ns for path in (clean / "shards").rglob("*")} == before


def test_a_shuffled_file_gives_each_request_the_same_bits(clean, model, requests, tmp_path):
    lines = [json.loads(line) for line in requests.open()]
    lines[-1]["id"] = 60
    random.Random(0).shuffle(lines)
    begin(model, written(tmp_path / "in.jsonl", lines), tmp_path / "out")
    found = {row["id"]: row for row in results(tmp_path / "out")}
    assert found == {row["id"]: row for row in results(clean)}
    assert list(found) == [line["id"] for line in lines]


def test_shares_in_processes_of_their_own_give_the_same_bytes(clean, model, requests, tmp_path):
    out = tmp_path / "out"
    jobs = [started(begin, model, requests, out, share=Share(number, 3)) for number in (3, 1, 2)]
    for process in jobs:
        process.join(60)
    assert [process.exitcode for process in jobs] == [0, 0, 0]
    assert content(out) == content(clean)


def test_the_last_share_writes_the_results_and_a_run_of_all_what_is_missing(
    clean, model, requests, tmp_path
):
    out, said = tmp_path / "out", []
    assert begin(model, requests, out, share=Share(2, 2), report=said.append) is None
    assert "other shards" in said[-1]
    assert not (out / "results.jsonl").exists()
    assert len(list((out / "shards").iterdir())) == 10
    assert begin(model, requests, out, share=Share(1, 2)).samples == 60
    assert content(out) == content(clean)
    # The share of a job that was killed is made by any run of all.
    other = tmp_path / "other"
    begin(model, requests, other, share=Share(1, 3))
    begin(model, requests, other)
    assert content(other) == content(clean)


def test_the_same_share_is_made_by_one_process_at_a_time(model, requests, tmp_path):
    out = tmp_path / "out"
    with (
        locked(out, Share(1, 2).lock),
        pytest.raises(CheckpointError, match=f"process {os.getpid()}"),
    ):
        begin(model, requests, out, share=Share(1, 2))


def test_a_share_of_another_plan_is_refused(model, requests, tmp_path):
    begin(model, requests, tmp_path / "out", share=Share(1, 2))
    other = Setting(seed=4, batch_size=3)
    with pytest.raises(ConfigError, match="begun with another plan: seed was 3, now 4"):
        begin(model, requests, tmp_path / "out", share=Share(2, 2), setting=other)


def test_two_shares_that_begin_at_once_have_one_plan(clean, model, requests, tmp_path, monkeypatch):
    """The plan of another process comes between the look for one and the own."""
    plain, first = plan.staged, []

    def late(path):
        if not first:
            first.append(path)
            begin(model, requests, tmp_path / "out", share=Share(2, 2))
        return plain(path)

    monkeypatch.setattr(plan, "staged", late)
    begin(model, requests, tmp_path / "out", share=Share(1, 2))
    assert content(tmp_path / "out") == content(clean)


def deadly(tmp_path, monkeypatch, rows, *positions):
    """The requests with some inserted there that kill their worker; their lines."""
    rows = list(rows)
    for position in positions:
        rows.insert(position, {"id": f"deadly {position}", "prompt": DEADLY, "length": 26})
    monkeypatch.setattr(offline, "Generator", DeadlyGenerator)
    path = written(tmp_path / "in.jsonl", rows)
    return path, [number for number, row in enumerate(rows, 1) if "deadly" in str(row.get("id"))]


def test_requests_that_kill_their_workers_fail_alone_and_the_rest_completes(
    model, tmp_path, fast_workers, monkeypatch
):
    path, lines = deadly(tmp_path, monkeypatch, asked()[:59], 7, 30)
    begin(model, path, tmp_path / "clean")
    said = []
    found = begin(model, path, tmp_path / "out", workers=2, report=said.append)
    assert [failure.line for failure in found.failures] == lines
    for failure in found.failures:
        assert failure.error.startswith("3 workers crashed at it alone, the last by signal 9")
    # Both are of one length and one batch, with a third request.
    assert sum("made without it" in line for line in said) == 2
    assert sum("made in parts" in line for line in said) == 1
    clean = {row["id"]: row for row in results(tmp_path / "clean")}
    made = {row["id"]: row for row in results(tmp_path / "out")}
    assert list(made) == [name for name in clean if "deadly" not in str(name)]
    other = {name for name in made if made[name] != clean[name]}
    assert len(other) <= SETTING.batch_size - 1
    for name in other:
        assert made[name]["tokens"] == clean[name]["tokens"]
        assert made[name]["log_prob"] == pytest.approx(clean[name]["log_prob"], rel=1e-5)
    # What is complete stays so, with its failures.
    assert begin(model, path, tmp_path / "out").failures == found.failures


def test_a_second_run_on_the_folder_is_refused_by_the_lock(model, requests, tmp_path):
    out = tmp_path / "out"
    with locked(out), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        begin(model, requests, out)
    assert not (out / "plan").exists()


def test_a_damaged_shard_is_regenerated_and_what_killed_writers_left_is_removed(
    clean, model, requests, tmp_path
):
    out = tmp_path / "out"
    begin(model, requests, out)
    (out / "shards" / "shard-000003" / "results.jsonl").write_text("{}\n")
    (out / "shards" / "shard-000005" / "manifest.json").unlink()
    for left in (out / ".plan.x.tmp", out / "shards" / ".shard-000007.x.tmp"):
        left.mkdir()
        (left / "half").write_text("of it")
    begin(model, requests, out)
    assert content(out) == content(clean)


def test_an_interrupt_keeps_what_is_complete(clean, model, requests, tmp_path):
    def report(line):
        if ": 3 of" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="3 of 20 shards are complete"):
        begin(model, requests, tmp_path / "out", report=report)
    begin(model, requests, tmp_path / "out")
    assert content(tmp_path / "out") == content(clean)
