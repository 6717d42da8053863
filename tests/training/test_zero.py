"""ZeRO-3: what needs no DeepSpeed here, and runs of two processes where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import zero_run
from accelerate import DeepSpeedPlugin
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from folders import ACCELERATE, ROOT, SUPPORT
from torch import nn
from toy_training import QUIET, largest_difference, log, recipe, same, tensors

import mdiff.training.optim
from mdiff.backbones.transformer import transformer
from mdiff.errors import BackendError, CheckpointError, ConfigError
from mdiff.files.atomic import step_path, steps
from mdiff.training import zero_slices
from mdiff.training.loop import train
from mdiff.training.optim import Muon
from mdiff.training.recipe import Train
from mdiff.training.zero import checked, refuse
from mdiff.training.zero_slices import Flat, Joined, ZeroPlacement, slice_of

FILES = sorted((ACCELERATE).glob("*.yaml"))
TYPES = {
    "cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "gpu": "NO", "zero3": "DEEPSPEED",
}  # fmt: skip
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is an extra: mdiff-toolkit[deepspeed]"
)


@pytest.fixture
def launched(monkeypatch):
    """What `accelerate launch` hands to its starter of processes, for a file and no options."""
    taken = []
    for name in ("simple_launcher", "multi_gpu_launcher", "deepspeed_launcher"):
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
    expected = {"MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed"}
    assert asked == {name: expected.get(TYPES[path.stem]) == name for name in asked}


def test_the_layer_that_fsdp2_cuts_by_is_one_of_the_transformer(launched):
    arguments = launched(ACCELERATE / "fsdp2.yaml")
    model = transformer(vocab_size=8, mask_id=8, max_length=4, width=16, depth=2, heads=2)
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count(arguments.fsdp_transformer_layer_cls_to_wrap) == 2
    assert arguments.fsdp_version in (2, "2")


def test_what_the_launcher_says_of_zero3_is_what_training_expects(launched, monkeypatch):
    arguments = launched(ACCELERATE / "zero3.yaml")
    arguments.main_process_port = 0
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for key in environment.keys() - os.environ.keys():
        monkeypatch.setenv(key, environment[key])
    settings = checked(DeepSpeedPlugin().deepspeed_config)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["gradient_clipping"] == 0.0
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_stage=2: expected 3"),
        ({"offload_param": {"device": "cpu"}}, "offload_param to 'cpu': expected none"),
        ({"bf16": {"enabled": True}}, "the recipe's train.precision"),
        ({"optimizer": {"type": "Adam"}}, "its own optimizer: expected none"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5"),
    ],
)
def test_settings_that_are_the_recipes_or_were_not_tried_are_refused(settings, message):
    given = {"zero_optimization": {"stage": 3, "offload_param": settings.pop("offload_param", {})}}
    with pytest.raises(ConfigError, match=message):
        checked(given | settings)


def test_float64_and_compiled_models_are_refused_with_the_way_out():
    for changed in ({"precision": "fp64"}, {"compile": True}):
        with pytest.raises(ConfigError, match=r"fsdp2\.yaml"):
            refuse(Train(steps=1, batch_size=1, **changed))
    refuse(Train(steps=1, batch_size=1, precision="bf16"))


def test_training_without_deepspeed_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(BackendError, match=r"pip install 'mdiff-toolkit\[deepspeed\]'") as error:
        train(recipe(), tmp_path / "run")
    assert error.value.exit_code == 5
    assert not (tmp_path / "run").exists()


class Cut(nn.Parameter):
    """A parameter as the engine leaves it to process `rank` of `world`."""

    def __new__(cls, whole, *, world):
        made = super().__new__(cls, torch.empty(0))
        made.ds_shape, made.ds_numel, made.ds_process_group = whole.shape, whole.numel(), world
        made.ds_tensor = torch.empty(-(-whole.numel() // world))
        return made


@pytest.fixture
def rank(monkeypatch):
    """Sets which process this one takes itself for; a group stands for its size."""
    here = [0]
    stand_in = SimpleNamespace(get_rank=lambda group: here[0], get_world_size=lambda group: group)
    monkeypatch.setattr(zero_slices, "dist", stand_in)
    return here


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 4)])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_slices_of_all_processes_in_a_row_are_the_whole(rank, shape, world):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameter = Cut(whole, world=world)
    slices = []
    for rank[0] in range(world):
        slices.append(slice_of(parameter, whole))
    assert {len(part) for part in slices} == {parameter.ds_tensor.numel()}
    gathered = torch.cat(slices)
    assert torch.equal(gathered[: whole.numel()].view(shape), whole)
    assert not gathered[whole.numel() :].any()


def alone(rank):
    """Two matrices and a vector of a world of one process, in the flat tensors of an engine."""
    zero_slices.dist.all_gather_into_tensor = lambda flat, part, group: flat.copy_(part)
    generator = torch.Generator().manual_seed(1)
    wholes = [torch.randn(s, generator=generator) for s in ((4, 6), (6, 3), (5,))]
    cut = [Cut(whole, world=1) for whole in wholes]
    joined = Joined([Muon(cut[:2], lr=0.1, weight_decay=0.1), torch.optim.AdamW(cut[2:], lr=0.1)])
    flats = [torch.cat([w.flatten() for w in wholes[:2]]), wholes[2].clone()]
    joined.flats += [Flat(flats[0], cut[:2], 0), Flat(flats[1], cut[2:], 1)]
    for group in joined.param_groups:
        group["params"] = []
    return wholes, joined, flats


def engine_step(joined, gradients):
    """A step as the engine takes it: one flat tensor after the other in its group."""
    for flat, gradient in zip(joined.flats, gradients):
        flat.tensor.grad = gradient
        joined.param_groups[flat.group]["params"] = [flat.tensor]
        joined.step()
        joined.param_groups[flat.group]["params"] = []


def test_joined_optimisers_on_slices_move_as_their_own_do_on_parameters(rank):
    wholes, joined, flats = alone(rank)
    plain = [nn.Parameter(whole.clone()) for whole in wholes]
    muon = Muon(plain[:2], lr=0.1, weight_decay=0.1)
    adam = torch.optim.AdamW(plain[2:], lr=0.1)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for parameter in plain:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients = [p.grad.flatten() for p in plain]
        engine_step(joined, [torch.cat(gradients[:2]), gradients[2]])
        muon.step()
        adam.step()
    expected = [torch.cat([p.detach().flatten() for p in plain[:2]]), plain[2].detach()]
    for got, value in zip(flats, expected):
        assert torch.equal(got, value)


def test_states_come_back_from_their_wholes_and_only_if_all_are_at_one_step(rank):
    _, joined, _ = alone(rank)
    engine_step(joined, [torch.ones(42), torch.ones(5)])
    names = ["one", "two", "three"]
    cut = [p for flat in joined.flats for p in flat.parameters]
    placement = ZeroPlacement(nn.ParameterDict(dict(zip(names, cut))), joined, package=None)
    states = {
        name: placement.whole(name.split("/")[1], part, into=None) if part.dim() else part.clone()
        for name, part in placement.states().items()
    }
    assert {name.rpartition("/")[0] for name in states} == {"0/one", "0/two", "1/three"}
    before = {key: value.clone() for key, value in placement.states().items()}
    joined.state.clear()
    placement.load_states(states)
    assert same(before, placement.states())
    del states["0/two/momentum_buffer"]
    with pytest.raises(CheckpointError, match="'one' and 'two' are not at the same step"):
        placement.load_states(states)
    assert same(before, placement.states())


def two_processes(out, settings, *, deadly=0):
    """A run of two ZeRO-3 processes on the CPU; what it ended with."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         str(ACCELERATE / "zero3.yaml"), "--main_process_port", "0",
         str(SUPPORT / "zero_run.py"), str(out), json.dumps(settings), str(deadly)],
        capture_output=True, text=True, timeout=400, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip


@needs_deepspeed
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_zero_processes_train_as_one_does_and_survive_their_death(
    tmp_path, monkeypatch, optimizer
):
    # One step of each epoch of 20 rows is not finite, and is left out.
    settings = {
        "precision": "fp32", "model__dropout": 0.0, "optim__name": optimizer, "micro_batch": 2,
        "steps": 50, "save_every": 25, "data__poison": 13, "nonfinite": "skip",
    }  # fmt: skip
    monkeypatch.setattr(
        "mdiff.training.optim.orthogonalised", zero_run.exact(mdiff.training.optim.orthogonalised)
    )
    one = train(recipe(**settings), tmp_path / "one", **QUIET)
    done = two_processes(tmp_path / "two", settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    two = step_path(tmp_path / "two", 50)
    # float32 sums in another order; one process against two of DDP differ by 2e-7.
    assert largest_difference(tensors(one), tensors(two)) < 1e-5
    logs = [log(tmp_path / name) for name in ("one", "two")]
    losses = [[record.get("loss", record.get("rows")) for record in records] for records in logs]
    assert [13] in losses[0]
    assert losses[0] == [pytest.approx(loss, rel=1e-6) for loss in losses[1]]
    assert two_processes(tmp_path / "killed", settings, deadly=38).returncode != 0
    assert steps(tmp_path / "killed") == [25]
    done = two_processes(tmp_path / "killed", settings)
    assert done.returncode == 0, done.stderr
    assert same(tensors(two), tensors(step_path(tmp_path / "killed", 50)))
    fewer = train(
        recipe(**settings), tmp_path / "fewer", resume=str(step_path(tmp_path / "two", 25)), **QUIET
    )
    assert largest_difference(tensors(one), tensors(fewer)) < 1e-5


@needs_deepspeed
def test_a_model_that_zero3_trained_generates(tmp_path):
    changes = ["train.steps=4", "model.width=32", "model.depth=2", "data.length=32"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
         "configs/accelerate/zero3.yaml", "--main_process_port", "0", "-m", "mdiff", "train",
         "configs/text/tiny.yaml", "--out", str(tmp_path),
         *(word for change in changes for word in ("--set", change))],
        capture_output=True, text=True, timeout=400, check=False, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # stdout carries the path alone, whatever DeepSpeed prints.
    assert done.stdout == f"{step_path(tmp_path, 4)}\n"
    samples = mdiff.load(str(step_path(tmp_path, 4))).generate(length=8, n=2, seed=0)
    assert [len(sample.tokens) for sample in samples] == [8, 8]
