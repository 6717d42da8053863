"""From what a run can be resumed, and what a resumed run may change."""

from __future__ import annotations

import pytest
from toy_training import (
    QUIET,
    log,
    recipe,
    same,
    tensors,
)

import mdiff.training.checkpoint as checkpoint
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.atomic import step_path, steps
from mdiff.training.loop import train
from mdiff.training.recipe import differences, parse_recipe


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
    "objective.process": {"name": "uniform"},
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


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    train(recipe(steps=1), tmp_path, **QUIET)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="is not of format 2"):
        train(recipe(steps=2), tmp_path, **QUIET)


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
