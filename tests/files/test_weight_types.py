"""Checkpoints of weights in several types, and devices that are not there."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from folders import GOLDEN
from masked_lms import MASK, tiny
from safetensors.torch import load_file, save_file

import mdiff
from mdiff import BackendError, ConfigError
from mdiff.cli import run
from mdiff.errors import MdiffWarning

FAMILIES = ["llada", "dream", "mdlm", "bd3lm", "smdm", "llada_moe", "llada2_moe",
            "halton_transformer", "maskbit_lfqbert"]  # fmt: skip
HALF = torch.bfloat16


def options(name):
    return {"device": "cpu"} | ({"mask_id": 63} if name.endswith("_moe") else {})


def mixed(name, folder, wide):
    """A copy whose weights are bfloat16, but for those that `wide` chooses by name, in float32."""
    shutil.copytree(GOLDEN / name, folder)
    path = folder / "model.safetensors"
    tensors = {
        key: tensor.to(torch.float32 if wide(key) else HALF)
        if tensor.is_floating_point()
        else tensor
        for key, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    return {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}


def learned_types(pipeline):
    """The types of the weights, routers excepted, which compute in float32 of any type."""
    named = pipeline.denoiser.named_parameters()
    return {p.dtype for name, p in named if not name.endswith("gate.weight")}


@pytest.mark.parametrize("part", ["norm", "embed", "head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_two_types_become_that_of_most_with_a_warning(name, part, tmp_path):
    wide = mixed(name, tmp_path / "model", lambda key: part in key or "ln" in key)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", MdiffWarning)
        pipeline = mdiff.load(tmp_path / "model", **options(name))
    kinds = learned_types(pipeline)
    assert len(kinds) == 1
    messages = [str(one.message) for one in said if issubclass(one.category, MdiffWarning)]
    parameters = {name for name, _ in pipeline.denoiser.named_parameters()}
    assert bool(messages) == bool({key for key in wide & parameters if "gate.weight" not in key})
    assert all("holds weights of several types" in line for line in messages)
    size = {} if pipeline.modality.name != "ids" or pipeline.window == 16 else {"length": 8}
    pipeline.generate(**size)


def test_a_type_that_is_given_is_taken_without_a_word(tmp_path):
    mixed("mdlm", tmp_path / "model", lambda key: "norm" in key)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MdiffWarning)
        pipeline = mdiff.load(tmp_path / "model", dtype="float32", device="cpu")
    assert learned_types(pipeline) == {torch.float32}


def test_a_command_says_it_in_one_line(tmp_path):
    mixed("mdlm", tmp_path / "model", lambda key: "norm" in key)
    with pytest.warns(MdiffWarning, match="of F32 are read as BF16, that of most"):
        assert run(["generate", str(tmp_path / "model"), "--length", "4"]) == 0


def test_routers_keep_a_type_of_their_own(tmp_path):
    mixed("llada2_moe", tmp_path / "model", lambda key: key.endswith("gate.weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MdiffWarning)
        pipeline = mdiff.load(tmp_path / "model", **options("llada2_moe"))
    gates = [p for n, p in pipeline.denoiser.named_parameters() if n.endswith("gate.weight")]
    assert gates
    assert {gate.dtype for gate in gates} == {torch.float32}


def test_a_masked_language_model_of_two_types_is_read_in_that_of_most(tmp_path):
    model = tiny("bert", mask_token_id=MASK).to(HALF)
    model.cls.predictions.bias.data = model.cls.predictions.bias.data.float()
    model.bert.embeddings.LayerNorm.float()
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config.pop("dtype", None)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.warns(MdiffWarning, match="read as BF16"):
        pipeline = mdiff.load(tmp_path / "model", device="cpu")
    assert {p.dtype for p in pipeline.denoiser.parameters()} == {HALF}
    pipeline.generate("7 9", length=5)


# Every kind of device that torch can name, with a number and without.
TYPES = ["cuda", "mps", "xpu", "hpu", "xla", "ipu", "vulkan", "hip", "fpga", "maia", "mtia",
         "mkldnn", "opengl", "opencl", "ideep", "ve", "lazy", "privateuseone", "meta"]  # fmt: skip
ABSENT = [kind + number for kind in TYPES for number in ("", ":0", ":7")]


@pytest.mark.parametrize("device", ABSENT)
def test_a_device_that_is_not_there_is_refused_in_one_line(device, capsys):
    if device.startswith("cuda") and torch.cuda.is_available() and device != "cuda:7":
        return
    with pytest.raises((BackendError, ConfigError), match="device"):
        mdiff.load("builtin:shakespeare", device=device)
    code = run(["generate", "builtin:shakespeare", "--length", "4", "--device", device])
    # Of a name that this torch does not know it is the option that is wrong.
    assert code == (2 if is_unknown(device) else 5)
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)


def is_unknown(device):
    try:
        torch.device(device)
    except RuntimeError:
        return True
    return False


@pytest.mark.parametrize("device", ["", "gpu", "cpu:x", "cuda:-1", "CUDA", "0x", "cuda cuda", "é"])
def test_what_is_no_device_is_a_wrong_option(device, capsys):
    assert run(["generate", "builtin:shakespeare", "--length", "4", "--device", device]) == 2
    assert "unknown device" in capsys.readouterr().err


def test_a_map_with_a_device_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="device meta holds no numbers"):
        mdiff.load(GOLDEN / "mdlm", device={"": "meta"})
