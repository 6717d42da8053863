"""Denoisers whose weights or scales are not finite: never a result, never a saved model."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from denoisers import KINDS, calls, kind_of
from folders import GOLDEN
from safetensors.torch import load_file, save_file
from toy_training import recipe

import mdiff
from mdiff import CheckpointError, ConfigError, from_logits, nll_bound
from mdiff.cli import run
from mdiff.denoiser import guided
from mdiff.evaluation.ranking import rank
from mdiff.ops import BACKENDS
from mdiff.training.build import build_run
from mdiff.training.checkpoint import write_checkpoint
from mdiff.training.processes import started

DAMAGE = (math.nan, math.inf, -math.inf)
# Each of another network, of what guides one, and of pictures.
FEW = ["transformer", "guided", "masked lm bert", "mdlm", "llada_moe", "bd3lm", "maskbit_lfqbert"]


class damaged:  # noqa: N801
    """Within, an element of a parameter has another value."""

    def __init__(self, parameter, value):
        self.parameter, self.value = parameter, value

    def __enter__(self):
        self.kept = self.parameter.detach().clone()
        with torch.no_grad():
            self.parameter.flatten()[len(self.kept.flatten()) // 2] = self.value

    def __exit__(self, *_):
        with torch.no_grad():
            self.parameter.copy_(self.kept)


def finite(value):
    """Whether every number in nested lists is finite."""
    if isinstance(value, list | tuple):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def assert_never_a_figure(name, parameters):
    """Each call ends with exit code 4, or with finite figures where the damage was not read."""
    kind, refused = kind_of(name), 0
    for number, parameter in enumerate(parameters):
        with damaged(parameter, DAMAGE[number % 3]):
            for call, made in calls(kind, 0).items():
                try:
                    found = made()
                except CheckpointError:
                    refused += 1
                else:
                    assert finite(found), (name, call, number)
    assert refused > 0


@pytest.mark.parametrize("name", FEW)
def test_damaged_weights_give_no_figure(name):
    every = [p for p in kind_of(name).pipeline.denoiser.parameters() if p.is_floating_point()]
    assert_never_a_figure(name, [every[0], every[len(every) // 2], every[-1]])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_no_damaged_weight_of_any_kind_gives_a_figure(name):
    every = [p for p in kind_of(name).pipeline.denoiser.parameters() if p.is_floating_point()]
    assert_never_a_figure(name, every)


def test_a_stream_of_a_damaged_model_ends_in_an_error():
    kind = kind_of("transformer")
    with damaged(kind.pipeline.denoiser.head.weight, math.nan):
        states = kind.pipeline.stream("3 5", length=5)
        next(states)
        with pytest.raises(CheckpointError, match=r"samples \[0\]"):
            list(states)


def test_a_bound_that_is_infinite_names_its_rows():
    space = mdiff.TokenSpace(3, mask_id=3)
    sure = torch.tensor([0.0, -math.inf, -math.inf])
    model = from_logits(lambda tokens: sure.expand(*tokens.shape, 3))
    tokens = torch.tensor([[0, 0], [0, 1]])
    with pytest.raises(CheckpointError, match=r"rows \[1\] is not finite"):
        nll_bound(model, tokens, space=space, schedule=mdiff.Linear(), seed=0)
    assert nll_bound(model, tokens[:1], space=space, schedule=mdiff.Linear(), seed=0).nats == 0


def test_ranking_by_a_damaged_model_is_refused():
    emoji = mdiff.load("builtin:emoji", device="cpu")
    weights = next(p for n, p in emoji.denoiser.named_parameters() if n.startswith("blocks"))
    with damaged(weights, math.nan), pytest.raises(CheckpointError, match="not finite"):
        rank(emoji, {}, ["squid"], part="caption", draws=2)


@pytest.fixture
def damaged_folder(tmp_path):
    """A published model with NaN in its files, and data that it scores."""
    shutil.copytree(GOLDEN / "mdlm", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    next(t for name, t in tensors.items() if name.endswith("output_layer.linear.weight"))[3] = (
        math.nan
    )
    save_file(tensors, path)
    (tmp_path / "ids.jsonl").write_text('{"tokens": [1, 2, 3, 4, 5, 6, 7, 8]}\n')
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "model", "--length", "8"],
        ["generate", "model", "--length", "8", "--json"],
        ["eval", "model", "--data", "ids.jsonl", "--draws", "2", "--samples", "0"],
        ["eval", "model", "--data", "ids.jsonl", "--draws", "2", "--samples", "0", "--json"],
    ],
)
def test_commands_on_damaged_weights_exit_with_4_and_no_figure(
    arguments, damaged_folder, capsys, monkeypatch
):
    monkeypatch.chdir(damaged_folder)
    assert run(arguments) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert "weights are damaged" in said.err.splitlines()[-1]


def test_damaged_weights_are_not_saved(tmp_path):
    kind = kind_of("transformer")
    with (
        damaged(kind.pipeline.denoiser.head.weight, math.inf),
        pytest.raises(CheckpointError, match=r"head.weight holds NaN or infinite"),
    ):
        kind.pipeline.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_training_that_is_not_finite_is_not_saved(tmp_path):
    state = {"weights/a": torch.ones(3), "optimizer/b": torch.tensor([0.0, math.inf])}
    with pytest.raises(CheckpointError, match="optimizer/b holds NaN or infinite"):
        write_checkpoint(build_run(recipe(), started()), tmp_path, 1, state)
    assert list(tmp_path.iterdir()) == []


SCALES = [1.0, 0.0, -3.0, 7.5, 1e3, 1e12, 1e29, -1e29, 1e30]


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_that_is_taken_gives_finite_figures(scale):
    kind = kind_of("transformer")
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("MDIFF_BACKEND", backend)
            for schedule in ("constant", "linear"):
                (made,) = kind.pipeline.generate(
                    "3 5", length=5, guidance_scale=scale, guidance_schedule=schedule
                )
                assert math.isfinite(made.log_prob)
                assert math.isfinite(made.entropy)


@pytest.mark.parametrize("scale", [1.1e30, -1e31, 1e38, 1e39, 1e308, *DAMAGE])
def test_a_scale_that_overflows_is_named_and_refused(scale, capsys):
    with pytest.raises(ConfigError, match=r"guidance_scale=.*at most 1e\+30"):
        guided(kind_of("transformer").pipeline.denoiser, guidance_scale=scale, without={"a": 0})
    named = ["generate", "builtin:fashion", "--label", "bag", f"--guidance-scale={scale}"]
    assert run(named) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "guidance_scale=" in line
