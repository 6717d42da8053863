"""Batch generation: whatever process is killed, the result is that of one clean run."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import processes
import psutil
import pytest
from folders import ACCELERATE, ROOT
from toys import HashDenoiser
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
    tiny_model,
    written,
)  # fmt: skip

from mdiff.cli import run
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.atomic import locked
from mdiff.modalities.text.modality import text
from mdiff.pipeline.batch import engines, offline, plan
from mdiff.pipeline.batch.division import Share
from mdiff.pipeline.batch.offline import RequestShard, filled, make_batch
from mdiff.pipeline.batch.plan import Setting
from mdiff.pipeline.batch.requests import Failure, Request, read_requests
from mdiff.pipeline.pipeline import Pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def requests(tmp_path_factory):
    return written(tmp_path_factory.mktemp("in") / "in.jsonl", asked())


@pytest.fixture(scope="module")
def clean(model, requests, tmp_path_factory):
    """The folder of one uninterrupted run with one worker."""
    out = tmp_path_factory.mktemp("clean") / "out"
    begin(model, requests, out)
    return out


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


INVALID = [
    (b'{"prompt": "a", "length": 99}', "longer than the model's window"),
    (b'{"prompt": "hello", "length": 3}', "do not fit a canvas of 3"),
    (b'{"infill": "no gap"}', "nothing to fill in"),
    (b'{"infill": "' + b"[MASK:1000000]" * 2000 + b'"}', "more than 1048576 tokens"),
    (b'{"infill": "[MASK:0]"}', "expected 1 to"),
    (b'{"prompt": "a [MASK] b"}', "use infill"),
    (b'{"chat": "hi"}', "no chat template"),
    (b'{"prompt": "a"', "is not JSON"),
    (b'{"prompt": "\xff"}', "is not JSON"),
    (b'{"prompt": "\\ud800"}', "not valid Unicode"),
    (b'["prompt"]', "expected an object"),
    (b'{"prompt": "a", "prompt": "b"}', "occurs twice"),
    (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested deeper"),
    (b'{"promt": "a"}', "did you mean 'prompt'"),
    (b'{"prompt": 3}', "a string"),
    (b'{"prompt": "a", "chat": "b"}', "expected one of"),
    (b'{"prompt": "a", "length": true}', "length=True"),
    (b'{"prompt": "a", "length": 1000000000000}', "expected 1 to 1048576"),
    (b'{"prompt": "a", "seed": 1.5}', "seed=1.5"),
    (b'{"prompt": "a", "seed": 99999999999999999999999}', "64 bits"),
    (b'{"prompt": "a", "id": []}', "id="),
    (b'{"prompt": "a", "id": "' + b"x" * 300 + b'"}', "1 to 200 characters"),
    (b'{"prompt": "' + b"x" * 2**20 + b'"}', "at most 1048576 are read"),
    (b'{"prompt": "a", "id": "twin"}', 'the id "twin" occurs 2 times'),
    (b'{"prompt": "b", "id": "twin"}', 'the id "twin" occurs 2 times'),
]


def test_invalid_requests_are_reported_and_the_rest_completes(model, tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    good = b'{"id": "good", "prompt": "a", "length": 12}\n'
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n".join(line for line, _ in INVALID) + b"\n\n")
    words = ["generate", model, "--input", str(path), "--out", str(tmp_path / "out")]
    start = time.monotonic()
    assert run([*words, "--json"]) == 3
    assert time.monotonic() - start < 10
    written_out = capsys.readouterr()
    assert json.loads(written_out.out)["failed"] == len(INVALID)
    assert "25 requests failed" in written_out.err
    assert [row["id"] for row in results(tmp_path / "out")] == ["good"]
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").open()]
    assert [failure["line"] for failure in failures] == list(range(2, len(INVALID) + 2))
    for failure, (line, why) in zip(failures, INVALID):
        assert why in failure["error"], line[:80]
    # They are reported again by a run that has nothing left to make.
    assert run(words) == 3
    alone = written(tmp_path / "alone.jsonl", [{"id": "good", "prompt": "a", "length": 12}])
    assert run([*words[:3], str(alone), "--out", str(tmp_path / "alone")]) == 0
    assert results(tmp_path / "alone") == results(tmp_path / "out")


class Choking(HashDenoiser):
    """Raises where it is shown an "x"."""

    def __call__(self, tokens, **rest):
        if (tokens == ord("x")).any():
            raise DataError("an x")
        return super().__call__(tokens, **rest)


def test_a_request_that_spoils_its_batch_fails_alone():
    modality = text()
    space, setting = modality.space, Setting(seed=5, num_samples=2, length=9)
    whole = Pipeline(HashDenoiser(space), space, modality, window=16)
    choking = Pipeline(Choking(space), space, modality, window=16, sampler="any_order")
    batch = [Request(i, f"q{i}", "prompt", words) for i, words in enumerate("abxd")]
    found = {r.id: made for r, made in filled(choking, batch, setting)}
    assert found["q2"] == Failure(2, "q2", "an x")
    for request in (batch[0], batch[1], batch[3]):
        alone = whole.generate(
            request.words, length=9, num_samples=2, seed=request.seed(5), sampler="any_order"
        )
        if not any(ord("x") in sample.tokens for sample in alone):
            assert [s.tokens for s in found[request.id]] == [s.tokens for s in alone]
            assert [s.seed for s in found[request.id]] == [s.seed for s in alone]


def test_a_batch_is_split_into_requests_and_a_request_into_none(tmp_path):
    modality = text()
    pipeline = Pipeline(HashDenoiser(modality.space), modality.space, modality, window=16)
    batch = tuple(Request(i, f"q{i}", "prompt", words) for i, words in enumerate("abc"))
    shard = RequestShard(0, (batch[:2], batch[2:]), tmp_path / "shard")
    parts = shard.split(shard.item(0))
    assert parts == [(batch[0],), (batch[1],)]
    assert not any(map(shard.split, (*parts, shard.item(1))))
    made = [make_batch(pipeline, Setting(length=9), part) for part in (parts[0], shard.item(1))]
    shard.write([made[0], shard.failure(parts[1], "signal 11"), made[1]])
    assert [row["id"] for row in results(shard.path)] == ["q0", "q2"]
    failed = json.loads((shard.path / "failures.jsonl").read_text())
    assert failed == {
        "line": 1, "id": "q1", "error": "3 workers crashed at it alone, the last by signal 11"
    }  # fmt: skip


def test_a_seed_depends_on_the_id_and_the_seed_of_the_run_alone():
    one, two = (read_requests(line)[0][0] for line in (b'{"prompt":""}', b'\n{"prompt":"b"}'))
    assert one.seed(0) != two.seed(0) != two.seed(1)
    text_id, number_id = Request(1, "1", "prompt", ""), Request(9, 1, "prompt", "")
    assert number_id.seed(0) == one.seed(0) != text_id.seed(0)
    assert Request(1, 1, "prompt", "", None, 2**64 - 1).seed(0) == -1


def test_another_plan_is_refused_with_the_difference(clean, model, requests, tmp_path):
    was = content(clean)
    other = Setting(seed=4, batch_size=3, options={"temperature": 0.5})
    with pytest.raises(ConfigError, match=r"temperature was null, now 0\.5; seed was 3, now 4"):
        begin(model, requests, clean, setting=other)
    rows = [json.loads(line) for line in requests.open()]
    rows[6]["prompt"] = "another"
    with pytest.raises(ConfigError, match="the requests differ from line 7 on"):
        begin(model, written(tmp_path / "in.jsonl", rows), clean)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "novel.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"novel\.txt and no plan"):
        begin(model, requests, tmp_path / "full")
    assert content(clean) == was


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(options={"steps": 0, "sampler": "confidence"}), "steps=0"),
        (Setting(options={"nonsense": 1}), "nonsense"),
        (Setting(num_samples=0), "num_samples=0"),
        (Setting(options={"temperature": -1.0}), "temperature"),
    ],
)
def test_invalid_options_leave_no_plan(model, requests, tmp_path, setting, message):
    with pytest.raises(ConfigError, match=message):
        begin(model, requests, tmp_path / "out", setting=setting)
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "2"], "--workers needs --input"),
        (["--shard", "1/2"], "--shard needs --input"),
        (["--engine", "ray"], "--engine needs --input"),
        (["--input", "IN", "--out", "o", "--shard", "9/8"], "--shard 9/8: expected K/N"),
        (["--input", "IN", "--out", "o", "--engine", "dask"], "--engine 'dask'"),
        (["--input", "IN", "--out", "o", "--address", "a:1"], "is for --engine ray"),
        (["--timeout", "9"], "--timeout needs --input"),
        (["--input", "IN", "--out", "o", "--timeout", "-1"], "timeout=-1: expected more than 0"),
        (["--out", "o"], "--out is for models of pictures; one of text takes it with --input"),
        (["--input", "IN", "--out", "o", "--workers", "0"], "workers=0"),
        (["--input", "IN", "--out", "o", "--stream"], "--stream does not go with"),
    ],
)
def test_bad_options_of_volume_are_one_line(
    model, requests, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    words = [str(requests) if word == "IN" else word for word in words]
    assert run(["generate", model, *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def volume(model, requests, out):
    return [
        "mdiff", "generate", model, "--input", requests, "--out", out, "--seed", "3",
        "--batch-size", "3", "--length", "40",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)]
)
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_command_that_is_ended_leaves_no_process(model, tmp_path, number, code, whole_group):
    rows = [{"id": i, "prompt": "", "length": 40} for i in range(600)]
    requests = written(tmp_path / "in.jsonl", rows)
    words = [sys.executable, "-m", *volume(model, requests, tmp_path / "out"), "--workers", "2"]
    with processes.running(words, cwd=ROOT) as process:
        while not list((tmp_path / "out" / "shards").glob("shard-*")):
            time.sleep(0.01)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        (os.killpg if whole_group else os.kill)(process.pid, number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == code, err
        assert psutil.wait_procs(family, timeout=30)[1] == []
    if number == signal.SIGINT:
        assert "shards are complete; the same command goes on" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_accelerate_launch_gives_the_same_bytes(model, requests, tmp_path):
    processes.python("-m", *volume(model, requests, tmp_path / "one"), cwd=ROOT, check=True)
    launcher = processes.launcher(ACCELERATE / "cpu.yaml", "-m")
    words = [*launcher, *volume(model, requests, tmp_path / "two")]
    processes.run(words, cwd=ROOT, check=True)
    assert (tmp_path / "two" / ".lock-2-of-2").exists()
    assert content(tmp_path / "two") == content(tmp_path / "one")
