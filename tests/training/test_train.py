"""Training: exact resume, splits that do not matter, interruptions that lose nothing."""

from __future__ import annotations

import json
import os
import signal
import time

import processes
import pytest
import torch
import watched_run
from accelerate import Accelerator
from folders import ACCELERATE
from toy_training import (
    QUIET,
    largest_difference,
    log,
    recipe,
    same,
    tensors,
    training,
    wait_for_line,
)

import mdiff.training.checkpoint as checkpoint
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.atomic import latest, locked, step_path, steps, verify
from mdiff.training.build import build_run
from mdiff.training.loop import train
from mdiff.training.recipe import differences, parse_recipe


def test_a_checkpoint_has_what_generation_and_resuming_need(tmp_path):
    path = train(recipe(), tmp_path, **QUIET)
    assert path == step_path(tmp_path, 8)
    assert steps(tmp_path) == [3, 6, 8]
    assert set(verify(path).files) == {
        "config.json", "marks.json", "model.safetensors", "pipeline.json", "training.json",
        "training.safetensors",
    }  # fmt: skip
    pipeline = json.loads((path / "pipeline.json").read_text())
    assert pipeline["space"] == {"vocab_size": 9, "mask_id": 9, "never": [8], "parts": []}
    assert pipeline["schedule"] == {"name": "linear"}
    assert pipeline["length"] == 6
    state = tensors(path)
    averaged, raw = state["averaged/head.weight"], state["weights/head.weight"]
    assert torch.equal(state["model/head.weight"], averaged)
    assert not torch.equal(averaged, raw)


@pytest.mark.parametrize("micro_batch", [None, 2], ids=["accumulation 1", "accumulation 4"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, micro_batch, workers):
    settings = {"micro_batch": micro_batch, "workers": workers}
    whole = train(recipe(**settings), tmp_path / "whole", **QUIET)
    for cut in (3, 6) if workers == 0 else (3,):
        out = tmp_path / f"cut {cut}"
        source = step_path(tmp_path / "whole", cut)
        resumed = train(recipe(**settings), out, resume=str(source), **QUIET)
        assert same(tensors(whole), tensors(resumed))
        assert log(out) == log(tmp_path / "whole")[cut:]


def test_resuming_runs_no_step_twice_and_keeps_the_log_whole(tmp_path):
    train(recipe(steps=4), tmp_path / "run", **QUIET)
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    train(recipe(steps=8), tmp_path / "run", **QUIET)
    assert [record["step"] for record in log(tmp_path / "run")] == list(range(1, 9))
    lines = []
    before = (tmp_path / "run" / "log.jsonl").read_text()
    done = train(recipe(steps=8), tmp_path / "run", report=lines.append)
    assert done == step_path(tmp_path / "run", 8)
    assert lines == ["step 8 of 8 is done: nothing to train"]
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_how_rows_are_split_does_not_change_the_result(tmp_path, optimizer):
    shared = {"precision": "fp64", "model__dropout": 0.0, "optim__name": optimizer, "steps": 6}
    whole = train(recipe(**shared), tmp_path / "whole", **QUIET)
    for micro_batch in (1, 3):
        split = train(recipe(**shared, micro_batch=micro_batch), tmp_path / str(micro_batch),
                      **QUIET)  # fmt: skip
        assert largest_difference(tensors(whole), tensors(split)) < 1e-12
        losses = [[r["loss"] for r in log(path.parent)] for path in (whole, split)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_gradients_are_those_of_the_global_mean_over_maskable_tokens(tmp_path):
    gradients = []
    for micro_batch in (None, 3):
        settings = recipe(precision="fp64", model__dropout=0.0, micro_batch=micro_batch)
        accelerator = Accelerator(mixed_precision="no", cpu=True)
        run = build_run(settings, accelerator)
        rows = run.rows[5]
        total = sum(batch.valid.sum() for _, batch in rows)
        run.stepper._gradients(5, rows, total=total, seed=11)
        gradients.append([p.grad.clone() for p in run.backbone.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*gradients))


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


def test_a_killed_run_goes_on_from_its_last_complete_checkpoint(tmp_path):
    settings = {"steps": 120, "save_every": 10, "log__every": 1}
    whole = train(recipe(**settings), tmp_path / "whole", **QUIET)
    out = tmp_path / "killed"
    for _ in range(2):
        with training(out, settings) as process:
            wait_for_line(process, "step ")
            time.sleep(0.1)
            process.kill()
            process.communicate()
        found = latest(out)
        if found is not None:
            verify(found)
    resumed = train(recipe(**settings), out, **QUIET)
    assert same(tensors(whole), tensors(resumed))
    assert [record["step"] for record in log(out)] == list(range(1, 121))
    assert [p for p in out.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_its_step_and_says_so(tmp_path, number):
    settings = {"steps": 10**6, "save_every": 10**6, "log__every": 1, "optim__schedule": "constant"}
    with training(tmp_path / "run", settings) as process:
        wait_for_line(process, "step 2/")
        process.send_signal(number)
        _, errors = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "--resume auto goes on" in errors.splitlines()[-1]
    found = latest(tmp_path / "run")
    assert found is not None
    done = steps(tmp_path / "run")[-1]
    assert [record["step"] for record in log(tmp_path / "run")] == list(range(1, done + 1))


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)]
)
def test_a_stop_sent_to_a_whole_group_of_processes_saves_the_step_too(tmp_path, number):
    settings = {
        "steps": 10**6, "save_every": 10**6, "log__every": 1, "optim__schedule": "constant",
        "workers": 1, "data__slow": True,
    }  # fmt: skip
    with training(tmp_path / "run", settings) as process:
        wait_for_line(process, "step 2/")
        # It waits for rows now, which the loader still has to bring.
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=200)
    assert "--resume auto goes on" in errors.splitlines()[-1]
    verify(latest(tmp_path / "run"))
    done = steps(tmp_path / "run")[-1]
    assert [record["step"] for record in log(tmp_path / "run")] == list(range(1, done + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_saves_its_step_and_puts_the_handlers_back(tmp_path, number):
    def mine(number, frame):
        raise AssertionError("the run's handler was not asked")

    def stop(line):
        if line.startswith("step 1/"):
            os.kill(os.getpid(), number)

    before = signal.signal(number, mine)
    try:
        with pytest.raises(KeyboardInterrupt, match="--resume auto goes on"):
            train(recipe(log__every=1), tmp_path, report=stop)
        assert signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)
    verify(latest(tmp_path))
    assert steps(tmp_path)[-1] < 8


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(recipe(), tmp_path, report=lambda line: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps(tmp_path)[-1] == 8


def test_a_second_process_cannot_write_the_same_run(tmp_path):
    with locked(tmp_path):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                train(recipe(), tmp_path, **QUIET)
            except CheckpointError as error:
                os.write(write, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        assert b"is being written by process" in os.read(read, 500)
        os.close(read)
    assert steps(tmp_path) == []


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path):
    train(recipe(steps=3), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match=r"optim.lr: 0.02 -> 0.5; train.seed: 0 -> 4"):
        train(recipe(optim__lr=0.5, seed=4), tmp_path, **QUIET)
    train(recipe(steps=4, save_every=1, keep=2, log__every=1), tmp_path, **QUIET)
    assert steps(tmp_path) == [3, 4]


def test_a_stray_file_in_the_newest_step_changes_nothing(tmp_path, caplog):
    whole = train(recipe(optim__schedule="constant"), tmp_path / "whole", **QUIET)
    train(recipe(steps=6, optim__schedule="constant"), tmp_path / "run", **QUIET)
    for name in (".DS_Store", "README.md", "notes.txt"):
        (step_path(tmp_path / "run", 6) / name).write_text("x")
    lines = []
    again = train(recipe(optim__schedule="constant"), tmp_path / "run", report=lines.append)
    assert lines[0].startswith("step 7/8")
    assert same(tensors(whole), tensors(again))
    assert "passed over" not in caplog.text


def test_a_newer_step_that_is_passed_over_is_said_by_whatever_resumes(tmp_path):
    train(recipe(steps=6), tmp_path / "run", **QUIET)
    (step_path(tmp_path / "run", 6) / "vocab.json").write_text("x")
    lines = []
    train(recipe(), tmp_path / "new", resume=str(tmp_path / "run"), report=lines.append)
    assert "step-000006 is passed over" in lines[0]
    assert "vocab.json is not in the manifest" in lines[0]
    lines = []
    train(recipe(), tmp_path / "run", report=lines.append)
    assert "step-000006 is damaged (vocab.json is not in the manifest" in lines[0]


def test_data_that_has_moved_is_the_same_data(tmp_path, monkeypatch):
    import toy_medium

    settings = {"optim__schedule": "constant"}
    whole = train(recipe(data__source="a.txt", **settings), tmp_path / "whole", **QUIET)
    train(recipe(steps=3, data__source="a.txt", **settings), tmp_path / "run", **QUIET)
    lines = []
    moved = recipe(**settings, data__source=["/b.jsonl"], data__field="t", data__separator="|")
    again = train(moved, tmp_path / "run", report=lines.append)
    assert lines[0] == (
        "data.source: 'a.txt' -> ['/b.jsonl']; data.field: None -> 't'; "
        "data.separator: None -> '|': it is the same data"
    )
    assert same(tensors(whole), tensors(again))
    monkeypatch.setattr(toy_medium.ToyRows, "version", 2)
    with pytest.raises(DataError, match=r"digest \w{12}; data.source: \['/b.jsonl'\] -> 'c.txt'"):
        train(recipe(data__source="c.txt", **settings), tmp_path / "run", **QUIET)


FREE = {
    "train.steps", "train.save_every", "train.keep", "train.micro_batch", "train.workers",
    "train.compile", "train.nonfinite", "log.every", "log.trackers", "log.tensorboard",
    "data.source", "data.field", "data.separator", "train.validate_every", "train.validate_rows",
    "train.validate_draws",
}  # fmt: skip
# For each type of value another one; of words those that a recipe takes.
OTHER = {
    "optim.name": "adamw", "optim.betas": [0.5, 0.6], "optim.schedule": "linear",
    "optim.muon_scale": "spectral", "train.precision": "fp64", "train.nonfinite": "skip",
    "objective.weight": "uniform", "objective.schedule.name": "cosine", "modality.name": "marks2",
    "model.name": "backbone2", "objective.given": {"": 1.0}, "objective.ratio": {"mean": 0.4},
    "data.length": 7, "optim.final_lr": 0.5, "objective.max_weight": 5.0, "optim.adam_lr": 0.01,
    "train.micro_batch": 4, "train.keep": 1, "train.validate_every": 2, "log.trackers": ["trackio"],
}  # fmt: skip


def leaves(value, prefix=""):
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, child in value.items():
        yield from leaves(child, f"{prefix}.{key}" if prefix else key)


def with_value(content, key, value):
    """A copy of nested sections with the dotted key set."""
    first, _, rest = key.partition(".")
    if rest:
        value = with_value(content.get(first) or {}, rest, value)
    return content | {first: value}


def another(key, value):
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.001
    return "other"


def test_a_resumed_run_may_change_how_it_runs_and_nothing_that_it_computes():
    """Every key of a recipe, those of its parts included, changed alone."""
    old = recipe(data__source="a", data__field="b", data__separator="c", data__holdout=0.1)
    content = old.model_dump(mode="json")
    keys = dict(leaves(content))
    assert len(keys) > 40
    free = set()
    for key, value in keys.items():
        new = parse_recipe(with_value(content, key, another(key, value)))
        found = differences(old, new, ignore=checkpoint.FREE)
        found = {each.split(".")[0] for each in found if each not in checkpoint.LOCATION}
        assert found <= {key.split(".")[0]}, key
        if not found:
            free.add(key)
    assert free == FREE


def test_changed_data_is_refused_with_both_digests(tmp_path, monkeypatch):
    import toy_medium

    train(recipe(steps=3), tmp_path, **QUIET)
    monkeypatch.setattr(toy_medium.ToyRows, "version", 2)
    with pytest.raises(
        DataError, match=r"20 rows with digest \w{12} -> 20 rows with digest \w{12}"
    ):
        train(recipe(), tmp_path, **QUIET)


def test_only_a_whole_unaltered_run_can_be_resumed_from(tmp_path):
    path = train(recipe(steps=3), tmp_path / "run", **QUIET)
    data = bytearray((path / "training.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "training.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="altered"):
        train(recipe(), tmp_path / "run", **QUIET)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no training state"):
        train(recipe(), tmp_path / "new", resume=str(foreign), **QUIET)
    with pytest.raises(CheckpointError, match="expected auto, none or a directory"):
        train(recipe(), tmp_path / "new", resume="sometimes", **QUIET)


def test_a_truncated_checkpoint_is_moved_aside_and_the_one_before_is_used(tmp_path):
    whole = train(recipe(), tmp_path / "whole", **QUIET)
    train(recipe(), tmp_path / "run", **QUIET)
    (step_path(tmp_path / "run", 8) / "training.safetensors").write_bytes(b"")
    lines = []
    again = train(recipe(), tmp_path / "run", report=lines.append)
    assert "damaged" in lines[0]
    assert lines[1].startswith("step 7/8")
    assert same(tensors(whole), tensors(again))


def test_starting_afresh_never_writes_over_another_run(tmp_path):
    train(recipe(steps=3), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="use --resume auto or another --out"):
        train(recipe(steps=3), tmp_path, resume="none", **QUIET)


def test_only_as_many_checkpoints_stay_as_were_asked_for(tmp_path):
    train(recipe(save_every=1, keep=2), tmp_path, **QUIET)
    assert steps(tmp_path) == [7, 8]


def test_a_step_that_is_not_finite_stops_the_run_and_names_its_rows(tmp_path):
    with pytest.raises(DataError, match=r"step \d: .* rows \[13\] of epoch 0"):
        train(recipe(data__poison=13, save_every=1, data__ragged=False), tmp_path, **QUIET)
    bad = len(log(tmp_path)) + 1
    assert steps(tmp_path) == list(range(1, bad))


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path):
    settings = {"data__poison": 13, "nonfinite": "skip", "save_every": 1, "data__ragged": False}
    path = train(recipe(**settings), tmp_path, **QUIET)
    skipped = [record["step"] for record in log(tmp_path) if record.get("skipped")]
    assert len(skipped) >= 2
    assert all(record["rows"] == [13] for record in log(tmp_path) if record.get("skipped"))
    before, after = (step_path(tmp_path, step) for step in (skipped[1] - 1, skipped[1]))
    assert same(tensors(before), tensors(after))
    assert all(bool(torch.isfinite(t).all()) for t in tensors(path).values())


def test_bf16_trains_float32_weights(tmp_path):
    path = train(recipe(precision="bf16", steps=2), tmp_path, **QUIET)
    assert {t.dtype for t in tensors(path).values()} == {torch.float32}


def test_an_option_that_no_part_knows_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'model.widht'.*did you mean 'model.width'"):
        train(recipe(model__widht=3), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match=r"'model.hidden_size'.*did you mean 'model.width'"):
        train(recipe(model__hidden_size=3), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match=r"model.vocab_size=5: the data gives 9"):
        train(recipe(model__vocab_size=5), tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="unknown schedule 'lineer'; did you mean 'linear'"):
        train(recipe(objective__schedule={"name": "lineer"}), tmp_path, **QUIET)


def test_training_learns(tmp_path):
    settings = {"steps": 150, "model__dropout": 0.0, "data__ragged": False, "model__width": 32}
    train(recipe(**settings, save_every=150, batch_size=16), tmp_path, **QUIET)
    losses = [record["loss"] for record in log(tmp_path)]
    # A uniform guess scores ln 8 = 2.08 nats.
    assert sum(losses[-20:]) / 20 < 1.7
