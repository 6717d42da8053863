"""Sharded training (FSDP2): two processes give what one gives, in the same checkpoints."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import fsdp_run
import processes
import pytest
import torch
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from folders import ACCELERATE, ROOT, SUPPORT
from safetensors.torch import save_file
from torch import nn
from toy_training import QUIET, largest_difference, log, recipe, same, tensors

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files.atomic import staged, step_path, steps
from mdiff.files.untrusted import read_tensors
from mdiff.process import Masking
from mdiff.training.build import build_run
from mdiff.training.loop import train
from mdiff.training.optim import AveragedWeights, optimizers
from mdiff.training.processes import started
from mdiff.training.recipe import Optim
from mdiff.training.state import capture, check, parameters, restore
from mdiff.training.step import LossOf

FILES = sorted((ACCELERATE).glob("*.yaml"))
TYPES = {"cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "gpu": "NO"}


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` hands to its starter of processes, for a file and no options."""
    taken = []
    for name in ("simple_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, name, taken.append)

    def arguments(path):
        launch.launch_command(
            launch.launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        )
        return taken.pop()

    return arguments


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_file_and_leaves_precision_to_the_recipe(launched, path):
    file = load_config_from_file(str(path))
    assert file.distributed_type == TYPES[path.stem]
    # Precision and accumulation are the recipe's, whatever the file.
    assert file.mixed_precision == "no"
    arguments = launched(path)
    assert arguments.mixed_precision == "no"
    assert arguments.gradient_accumulation_steps in (None, 1)
    assert arguments.num_processes == (1 if path.stem == "gpu" else 2)
    asked = {
        name: bool(getattr(arguments, name)) for name in ("multi_gpu", "use_fsdp", "use_deepspeed")
    }
    expected = {"MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp"}
    assert asked == {name: expected.get(TYPES[path.stem]) == name for name in asked}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_MEGATRON_LM": "True"}, "ACCELERATE_USE_MEGATRON_LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version=1: expected 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version=1: expected 2"),
    ],
)
def test_another_engine_is_refused_with_the_file_of_fsdp2(tmp_path, monkeypatch, asked, message):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as error:
        train(recipe(), tmp_path / "run")
    assert error.value.exit_code == 2
    assert "configs/accelerate/fsdp2.yaml" in str(error.value)
    assert not (tmp_path / "run").exists()


def loss_of(backbone):
    objective = SimpleNamespace(ratio=None, cond_drop=0.0, weight="bound")
    plain = SimpleNamespace(objective=objective)
    return LossOf(backbone, plain, space=None, process=Masking())


def test_a_model_is_sharded_by_its_own_layers_but_not_by_one_that_shares_a_parameter():
    options = {"vocab_size": 8, "mask_id": 8, "max_length": 4, "width": 16, "depth": 2, "heads": 2}
    for tie in (False, True):
        assert loss_of(transformer(**options, tie=tie))._no_split_modules == ["Block"]
    model = transformer(**options, tie=True)
    model.no_split = ("Block", "Embedding", "Unknown")
    assert loss_of(model)._no_split_modules == ["Block"]
    model = transformer(**options, tie=False)
    model.no_split = ("Block", "Embedding", "Unknown")
    assert loss_of(model)._no_split_modules == ["Block", "Embedding"]
    assert loss_of(nn.Linear(2, 2))._no_split_modules == []


# Of ragged rows, so that processes differ in tokens; every step's gradient is clipped.
SHARED = {
    "precision": "fp64", "batch_size": 4, "steps": 50, "save_every": 10, "optim__grad_clip": 0.05,
}  # fmt: skip
# The head is tied to the embedding, and the loss multiplies by its matrix without calling it.
TIED = SHARED | {
    "model": {"name": "transformer", "width": 16, "depth": 2, "heads": 2, "tie": True},
    "optim__name": "muon",
}  # fmt: skip
# One row a micro-batch: some hide nothing. Steps with row 13 are not finite, and left out.
TOY = SHARED | {
    "model__dropout": 0.0, "optim__name": "adamw", "micro_batch": 1, "data__poison": 13,
    "nonfinite": "skip",
}  # fmt: skip
# Its embeddings are a layer by transformers' list, and share a parameter with the head.
BERT = SHARED | {"model": {"name": "toy_medium:bert"}, "optim__name": "adamw"}
MODELS = {
    "tied": (TIED, "FSDPBlock"), "toy": (TOY, "FSDPSequential"), "bert": (BERT, "FSDPBertLayer")
}  # fmt: skip
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("toy", "bert")]


def two_processes(*jobs):
    """Runs of two sharded processes of `accelerate launch` on the CPU; see fsdp_run.py."""
    launcher = processes.launcher(ACCELERATE / "fsdp2.yaml")
    return processes.run([*launcher, SUPPORT / "fsdp_run.py", json.dumps(jobs)])


@pytest.fixture(scope="module", params=["tied", *SLOW])
def runs(request, tmp_path_factory):
    """Runs `one` and `two` of as many processes; `again` continues `two`, and `more` `one`."""
    settings, layer = MODELS[request.param]
    out = tmp_path_factory.mktemp("runs")
    train(recipe(**settings), out / "one", **QUIET)
    jobs = [
        (str(out / "two"), "none", settings, 0),
        (str(out / "again"), str(step_path(out / "two", 20)), settings, 0),
        (str(out / "more"), str(step_path(out / "one", 20)), settings, 0),
    ]
    processes.together(ACCELERATE / "fsdp2.yaml", fsdp_run.main, json.dumps(jobs))
    return out, settings, layer


def test_two_sharded_processes_train_as_one_does(runs):
    out, settings, layer = runs
    for rank in range(2):
        kinds = json.loads((out / "two" / f"kinds-{rank}.json").read_text())
        assert kinds == sorted(["FSDPLossOf", layer])
    one, two = (step_path(out / name, 50) for name in ("one", "two"))
    assert json.loads((two / "training.json").read_text())["processes"] == 2
    assert largest_difference(tensors(one), tensors(two)) < 1e-9
    logs = [log(out / name) for name in ("one", "two")]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys()
        assert [*ours.values()] == [
            value if isinstance(value, list) else pytest.approx(value, rel=1e-8)
            for value in theirs.values()
        ]
    norms = [record["grad_norm"] for record in logs[1] if "grad_norm" in record]
    assert min(norms) > settings["optim__grad_clip"]
    skipped = [record["rows"] for record in logs[1] if "skipped" in record]
    assert (skipped != []) is ("data__poison" in settings)
    assert all(rows == [13] for rows in skipped)


def test_two_sharded_processes_resume_bitwise(runs):
    out, *_ = runs
    assert same(*(tensors(step_path(out / name, 50)) for name in ("two", "again")))
    assert log(out / "again") == log(out / "two")[20:]


def test_one_two_and_one_process_continue_each_other(runs, tmp_path):
    out, settings, _ = runs
    one, more = (tensors(step_path(out / name, 50)) for name in ("one", "more"))
    assert largest_difference(one, more) < 1e-9
    source = step_path(out / "more", 30)
    fewer = train(recipe(**settings), tmp_path / "fewer", resume=str(source), **QUIET)
    assert largest_difference(one, tensors(fewer)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "toy"])
def test_sharded_processes_survive_sigkill_and_a_change_from_two_to_one_to_two(tmp_path, name):
    settings, _ = MODELS[name]
    assert two_processes((str(tmp_path / "two"), "auto", settings, 38)).returncode != 0
    assert steps(tmp_path / "two") == [10, 20, 30]
    done = two_processes(
        (str(tmp_path / "whole"), "none", settings, 0),
        (str(tmp_path / "two"), "auto", settings, 0),
    )
    assert done.returncode == 0, done.stderr
    whole = tensors(step_path(tmp_path / "whole", 50))
    assert same(whole, tensors(step_path(tmp_path / "two", 50)))
    source = step_path(tmp_path / "two", 20)
    train(recipe(**settings), tmp_path / "fewer", resume=str(source), **QUIET)
    source = step_path(tmp_path / "fewer", 30)
    done = two_processes((str(tmp_path / "more"), str(source), settings, 0))
    assert done.returncode == 0, done.stderr
    assert largest_difference(whole, tensors(step_path(tmp_path / "more", 50))) < 1e-9


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_ends_all_sharded_processes(tmp_path):
    settings = TOY | {"steps": 10}
    source = train(recipe(**settings), tmp_path / "one", **QUIET)
    state = read_tensors(source / "training.safetensors")
    del state["weights/head.bias"]
    # As a checkpoint of another version of the model: its manifest is right.
    with staged(step_path(tmp_path / "other", 10)) as folder:
        shutil.copy(source / "training.json", folder)
        save_file(state, folder / "training.safetensors")
    other = str(tmp_path / "other")
    done = two_processes((str(tmp_path / "two"), other, settings, 0))
    assert done.returncode != 0
    assert "'weights/head.bias' is not in the checkpoint" in done.stderr
    assert steps(tmp_path / "two") == []


@pytest.mark.slow
@pytest.mark.parametrize("tie", ["true", "false"])
def test_a_model_that_sharded_processes_trained_generates(tmp_path, tie):
    changes = [
        "train.steps=4", "model.width=32", "model.depth=2", "data.length=32", f"model.tie={tie}"
    ]  # fmt: skip
    done = processes.run(
        [*processes.launcher(ACCELERATE / "fsdp2.yaml", "-m"), "mdiff", "train",
         "configs/text/tiny.yaml", "--out", tmp_path,
         *(word for change in changes for word in ("--set", change))],
        cwd=ROOT, check=True,
    )  # fmt: skip
    # stdout carries the path alone.
    assert done.stdout == f"{step_path(tmp_path, 4)}\n"
    samples = mdiff.load(str(step_path(tmp_path, 4))).generate(length=8, n=2, seed=0)
    assert [len(sample.tokens) for sample in samples] == [8, 8]


def taken_step(model, name="muon", without=("unused",)):
    """Optimisers of the model after one step, in which some parameters had no gradient."""
    made = optimizers(model, Optim(name=name))
    for owner, parameter in model.named_parameters():
        parameter.grad = None if owner in without else torch.ones_like(parameter)
    for optimizer in made:
        optimizer.step()
    return made


class Tied(nn.Module):
    """Two names of one parameter, a buffer, and a parameter that no step reaches."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(4, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.tensor(3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_state_comes_back_as_it_was_taken_and_a_parameter_without_state_stays_so(optimizer):
    model = Tied()
    made = taken_step(model, optimizer)
    averaged = AveragedWeights(parameters(model), decay=0.9)
    state = capture(model, made, averaged)
    assert "weights/head.weight" not in state
    assert not any("unused" in name for name in state if name.startswith("optim/"))
    kept = {name: tensor.clone() for name, tensor in state.items()}
    other = Tied()
    fresh = optimizers(other, Optim(name=optimizer))
    averages = AveragedWeights(parameters(other), decay=0.9)
    before = capture(other, fresh, averages)
    assert not any(name.startswith("optim/") for name in before)
    check(state, other, fresh, averages)
    restore(state, other, fresh, averages)
    assert same(kept, capture(other, fresh, averages))
    assert other.head.weight is other.table.weight
    # A parameter whose state is not in what is restored has none after it.
    full = taken_step(other, optimizer, without=())
    assert len(capture(other, full, averages)) > len(kept)
    restore(state, other, full, averages)
    assert same(kept, capture(other, full, averages))
    # What was taken has memory of its own, and gives it to the next.
    for parameter in other.parameters():
        parameter.data.zero_()
    assert same(kept, state)
    again = capture(model, made, averaged, into=state)
    assert all(again[name].data_ptr() == state[name].data_ptr() for name in state)


def test_before_the_first_step_taking_a_state_takes_none():
    run = build_run(recipe(), started())
    taken = capture(run.backbone, run.optimizers, run.averaged)
    assert all(optimizer.state == {} for optimizer in run.optimizers)
    assert not any(name.startswith("optim/") for name in taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weights/count"), "'weights/count' is not in the checkpoint"),
        (lambda s: s.update({"averaged/x": torch.ones(1)}), "'averaged/x' is not in this model"),
        (lambda s: s.update({"weights/unused": torch.ones(3)}), r"is \(3,\) torch.float32, expec"),
        (lambda s: s.update({"weights/unused": torch.ones(2).double()}), "float64, expected"),
        (lambda s: s.update({"optim/7/unused/x": torch.ones(2)}), "belongs to no parameter"),
        (lambda s: s.update({"optim/2/unused/x": torch.ones(2)}), "belongs to no parameter"),
        (lambda s: s.update({"optim/-1/unused/x": torch.ones(2)}), "belongs to no parameter"),
        (lambda s: s.update({"optim/0/none/x": torch.ones(2)}), "belongs to no parameter"),
        (lambda s: s.update({"optim/0": torch.ones(2)}), "belongs to no parameter"),
        (lambda s: s.update({"optim/0/unused/x": torch.ones(3)}), r"has shape \(3,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    model = Tied()
    made = taken_step(model)
    state = capture(model, made, None)
    check(state, model, made, None)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        check(state, model, made, None)
