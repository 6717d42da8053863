"""mdiff inspect on models of other projects: nothing but config and headers is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import GOLDEN as GOLDEN
from safetensors.torch import load_file, save_file

from mdiff.cli import run
from mdiff.files import read_model_files
from mdiff.files.untrusted import read_json
from mdiff.pipeline.published import load_published


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny published model, to be spoiled."""
    return Path(shutil.copytree(GOLDEN / "mdlm", tmp_path / "model"))


def inspected(folder, capsys, code=0):
    assert run(["inspect", str(folder), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mdlm", {"architecture": "MDLM", "block_length": None, "uses_time": False}),
        ("bd3lm", {"architecture": "BD3LM", "block_length": 4, "window": 16}),
        ("smdm", {"architecture": "not named", "family": "smdm", "window": 32}),
        ("gidd", {"architecture": "DIT", "uses_time": True, "supported": True}),
    ],
)
def test_inspect_says_what_a_published_model_is(name, expected, capsys):
    found = inspected(GOLDEN / name, capsys)
    assert expected.items() <= found.items()
    module = load_published(read_model_files(GOLDEN / name), name)
    assert found["parameters"] == sum(each.numel() for each in module.parameters())
    assert found["space"]["mask_id"] == module.mask_id
    assert {tensor["used"] for tensor in found["tensors"]} == {"loaded"}
    assert found["missing"] == found["not_used"] == []
    assert found["types"] == {"F32": len(module.state_dict())}
    assert run(["inspect", str(GOLDEN / name)]) == 0
    assert f"mask {module.mask_id}" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "shift", "block", "noise"), [
    ("sdar", "none", 4, "mask"), ("llada_tied", "none", None, "mask"),
    ("dream", "token", None, "mask"), ("fast_dllm_v2", "block seed", 32, "mask"),
    ("wedlm", "none", 16, "mask"), ("nemotron_labs_diffusion", "block seed", 8, "mask"),
])  # fmt: skip
def test_inspect_says_mask_shift_block_noise_and_what_is_predicted(
    name, shift, block, noise, capsys
):
    assert run(["inspect", str(GOLDEN / name)]) == 0
    lines = dict(line.partition("  ")[::2] for line in capsys.readouterr().out.splitlines())
    said = {key.strip(): value.strip() for key, value in lines.items() if key.strip()}
    assert (said["shift"], said["noise"]) == (shift, noise)
    assert said.get("block length") == (None if block is None else str(block))
    assert said["predicts"] == "the clean token of each hidden position"


def test_inspect_says_where_noise_is_uniform(tmp_path, capsys):
    folder = Path(shutil.copytree(GOLDEN / "gidd", tmp_path / "model"))
    described = read_json(folder / "config.json") | {"p_uniform": 0.2}
    (folder / "config.json").write_text(json.dumps(described))
    found = inspected(folder, capsys)
    assert found["noise"] == "mask and uniform"
    assert found["predicts"] == "the clean token of each position given all others"


def test_inspect_shows_the_tensors_of_what_is_not_supported_and_exits_with_4(folder, capsys):
    described = read_json(folder / "config.json") | {"architectures": ["SomethingElse"]}
    (folder / "config.json").write_text(json.dumps(described))
    # Of any type, those included that nothing here reads.
    tensors = load_file(folder / "model.safetensors")
    tensors["light"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    found = inspected(folder, capsys, code=4)
    assert not found["supported"]
    assert found["architecture"] == "SomethingElse"
    assert {tensor["used"] for tensor in found["tensors"]} == {"unknown"}
    assert found["types"] == {"F32": 31, "F8_E4M3": 1}
    assert run(["inspect", str(folder)]) == 4
    printed = capsys.readouterr()
    assert "supported     no" in printed.out
    assert "SomethingElse, which is not supported" in printed.err


def test_inspect_names_what_is_missing_and_what_is_left_over(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.blocks.0.norm1.weight"]
    tensors["more"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    found = inspected(folder, capsys, code=4)
    assert found["missing"] == ["backbone.blocks.0.norm1.weight"]
    assert found["not_used"] == ["more"]


def test_inspect_lists_the_tensors_of_a_folder_without_a_config(folder, capsys):
    (folder / "config.json").unlink()
    (folder / "golden.safetensors").unlink()
    found = inspected(folder, capsys, code=4)
    assert len(found["tensors"]) == 31
    assert "config.json" in found["architecture"]
