"""Requests, options and plans that are refused, and what is then left."""

from __future__ import annotations

import json
import time

import pytest
from toys import HashDenoiser
from volume_runs import (
    WINDOW,
    begin,
    content,
    results,
    written,
)  # fmt: skip

from mdiff.cli import run
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.modalities.text.modality import text
from mdiff.pipeline.batch import plan as plans
from mdiff.pipeline.batch.offline import RequestShard, filled, make_batch
from mdiff.pipeline.batch.plan import Setting, canvas_of, planned
from mdiff.pipeline.batch.requests import Failure, Request, read_requests
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

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


def batches_of(model, rows, **setting):
    """The batches of a plan, each as the lengths of its requests."""
    content = "\n".join(map(json.dumps, rows)).encode()
    plan = planned(load(model, device="cpu"), content, Setting(**setting), model="", fixed={})
    return [[request.length for request in batch] for shard in plan.shards for batch in shard]


def test_a_batch_holds_as_many_samples_as_are_allowed(model):
    rows = [{"prompt": "", "length": 20}] * 5
    for samples, sizes in ((1, [4, 1]), (2, [2, 2, 1]), (4, [1] * 5), (9, [1] * 5)):
        found = batches_of(model, rows, batch_size=4, num_samples=samples)
        assert [len(batch) for batch in found] == sizes


def test_a_canvas_of_the_window_is_in_no_batch_with_a_longer_one(model):
    rows = [{"prompt": "", "length": WINDOW + more} for more in (0, 1, 0, 1)]
    found = batches_of(model, rows, options={"sampler": "blocks", "context": WINDOW})
    assert found == [[WINDOW] * 2, [WINDOW + 1] * 2]


def test_a_request_s_own_length_goes_before_the_new_tokens_of_all(model):
    pipeline, setting = load(model, device="cpu"), Setting(max_new_tokens=5)
    for length, found in ((30, 30), (None, 2 + 5)):
        request = Request(1, "x", "prompt", "ab", length=length)
        assert len(canvas_of(pipeline, request, setting)) == found


def test_a_shard_holds_few_batches_for_a_kill_to_cost():
    requests = [Request(line, line, "prompt", "") for line in range(64 * 40)]
    shards = plans._shards(requests, dict.fromkeys(range(64 * 40), 4), Setting(batch_size=1),
                          window=None)  # fmt: skip
    assert {len(shard) for shard in shards} == {32}


def test_an_altered_plan_is_damage_and_no_other_plan(tmp_path):
    plans.agree({"seed": 1}, tmp_path)
    path = tmp_path / "plan" / "plan.json"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(CheckpointError, match="altered"):
        plans.agree({"seed": 1}, tmp_path)
