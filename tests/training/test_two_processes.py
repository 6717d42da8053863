"""Two processes (DDP) train as one does, share each batch, and one of them writes."""

from __future__ import annotations

import json

import processes
import pytest
import watched_run
from folders import ACCELERATE
from toy_training import (
    QUIET,
    largest_difference,
    log,
    recipe,
    same,
    tensors,
)

from mdiff.files.atomic import step_path
from mdiff.training.loop import train

BY_TWO = {
    "precision": "fp64", "model__dropout": 0.0, "optim__name": "adamw", "micro_batch": 3,
    "steps": 50, "save_every": 25, "batch_size": 8, "data__count": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A run of two processes and one from its step 25 on, each with what its processes noted."""
    folder = tmp_path_factory.mktemp("by_two")
    run, again = folder / "run", folder / "again"
    processes.together(
        ACCELERATE / "cpu.yaml", watched_run.main, json.dumps(BY_TWO), str(run), "none",
        str(again), str(step_path(run, 25)),
    )  # fmt: skip
    return [
        (out, [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text()) for rank in (0, 1)])
        for out in (run, again)
    ]


@pytest.fixture
def by_two(twice):
    """The run of two processes, and what each of them noted of it; see watched_run.py."""
    return twice[0]


def test_two_processes_give_what_one_gives_and_one_continues_for_them(tmp_path, by_two):
    one = train(recipe(**BY_TWO), tmp_path / "one", **QUIET)
    two, _ = by_two
    path = step_path(two, 50)
    assert json.loads((path / "training.json").read_text())["processes"] == 2
    assert largest_difference(tensors(one), tensors(path)) < 1e-9
    assert [r["loss"] for r in log(tmp_path / "one")] == pytest.approx(
        [r["loss"] for r in log(two)], rel=1e-9
    )
    fewer = train(
        recipe(**BY_TWO), tmp_path / "fewer", resume=str(step_path(two, 25)), **QUIET
    )  # fmt: skip
    assert largest_difference(tensors(one), tensors(fewer)) < 1e-9


def test_two_processes_that_go_on_give_bitwise_what_two_gave(twice):
    (whole, _), (out, notes) = twice
    assert same(tensors(step_path(whole, 50)), tensors(step_path(out, 50)))
    assert log(out) == log(whole)[25:]
    # No step at or before the checkpoint is run again.
    assert [len(note["steps"]) for note in notes] == [25, 25]


def test_two_processes_stratify_times_over_the_whole_batch(by_two):
    size = BY_TWO["batch_size"]
    _, notes = by_two
    for number, shares in enumerate(zip(*(note["steps"] for note in notes)), start=1):
        assert [len(share["samples"]) for share in shares] == [size // 2, size // 2]
        assert all(share["timed"] == share["samples"] for share in shares)
        # Each of the batch's strata is met once, by whichever process.
        times = shares[0]["times"] + shares[1]["times"]
        assert sorted(int(t * size) for t in times) == list(range(size)), f"step {number}"
    # A process that stratified its own half would meet each of half as many strata once.
    halves = [[int(t * size / 2) for t in share["times"]] for share in notes[0]["steps"]]
    assert any(sorted(half) != list(range(size // 2)) for half in halves)


def test_two_processes_read_every_row_once_an_epoch(by_two):
    _, notes = by_two
    read = {}
    for shares in zip(*(note["steps"] for note in notes)):
        samples = [sample for share in shares for sample in share["samples"]]
        assert sorted(samples) == list(range(BY_TWO["batch_size"]))
        for share in shares:
            for row, epoch in zip(share["rows"], share["epochs"], strict=True):
                read.setdefault(epoch, []).append(row)
    # 50 steps of 8 rows are 20 epochs of 20 rows, whole ones, whose seams lie within steps.
    assert sorted(read) == list(range(20))
    assert all(sorted(rows) == list(range(BY_TWO["data__count"])) for rows in read.values())


def test_one_of_two_processes_writes(by_two):
    out, (first, second) = by_two
    made = {path.removeprefix(f"{out}/").split("/")[0] for path in first["changed"]}
    assert {".lock", "log.jsonl"} <= made
    assert any(name.startswith(".step-000050") for name in made)
    assert second["changed"] == []
