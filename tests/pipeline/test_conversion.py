"""Published pickles: what is taken out of them, what is left out, and what never runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hashed import GOLDEN, golden_weights
from safetensors.torch import load_file
from torch import Tensor

import mdiff
from mdiff.cli import run
from mdiff.errors import CheckpointError, ConfigError
from mdiff.modalities.image.codec import load_codec
from mdiff.pipeline.conversion import convert, read_pickle, weights_in


def halton() -> dict[str, Tensor]:
    return load_file(GOLDEN / "halton_transformer" / "model.safetensors")


def pickled(folder: Path, content: Any, *, golden: str = "halton_transformer") -> Path:
    """A file as a training run leaves it, its config beside it."""
    shutil.copy(GOLDEN / golden / "config.json", folder)
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    "nested",
    [
        lambda state: state,
        lambda state: {"iter": 3, "model_state_dict": state, "optimizer": {"state": {}}},
        lambda state: {"state_dict": {f"module._orig_mod.{k}": x for k, x in state.items()}},
        lambda state: {"model": {f"_orig_mod.{k}": x for k, x in state.items()}, "epoch": 1},
        lambda state: {"model": state | {"loss.logvar": torch.ones(1), "step": 7}},
    ],
)
def test_weights_are_found_wherever_a_run_keeps_them(nested: Any, tmp_path: Path) -> None:
    source = pickled(tmp_path, nested(halton()))
    done = convert(source, tmp_path / "out", from_pickle=True)
    assert done.family == "halton_transformer"
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == halton().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in halton().items())
    model: Any = mdiff.load(tmp_path / "out", device="cpu").denoiser
    assert type(model).__name__ == "HaltonTransformer"


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    state = halton()
    state["head.weight"] = state["tok_emb.weight"]
    convert(pickled(tmp_path, state), tmp_path / "out", from_pickle=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["head.weight"], after["tok_emb.weight"])


def test_a_lightning_file_of_a_tokenizer_becomes_a_codec(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    # What such files hold beside the weights: the callbacks' classes and the run's settings.
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = kind  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = golden_weights("vqgan_taming")
    content = {
        "state_dict": state | {"loss.discriminator.main.0.weight": torch.ones(2)},
        "callbacks": {kind: {"best": 0.1}},
        "hyper_parameters": argparse.Namespace(lr=1.0, steps=[1, 2]),
        "optimizer_states": [{"state": {}}],
    }
    torch.save(content, tmp_path / "last.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    config = json.loads((GOLDEN / "vqgan_taming" / "config.json").read_text())
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": {"base_learning_rate": 4.5e-6}
                                                         | config}))  # fmt: skip
    out = tmp_path / "codec"
    line = ["convert", str(tmp_path / "last.ckpt"), str(out), "--from-pickle"]
    assert run(line) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out)
    for said in ("taming: 183 tensors", "callbacks", "optimizer_states", "loss.discriminator"):
        assert said in printed.err
    codec = load_codec(out)
    assert all(torch.equal(codec.state()[name], tensor) for name, tensor in state.items())
    assert run(["tokenizer", "inspect", str(out)]) == 0


class Hostile:
    """Runs a command where it is unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("way", ["torch", "pickle", "old"])
@pytest.mark.parametrize("position", ["beside", "inside", "whole"])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(
    way: str, position: str, tmp_path: Path, capsys: Any
) -> None:
    mark = tmp_path / "it ran"
    state: dict[str, Any] = dict(halton())
    content: Any = {
        "beside": {"model": state, "args": Hostile(mark)},
        "inside": {"model": state | {"head.weight": Hostile(mark)}},
        "whole": Hostile(mark),
    }[position]
    source = pickled(tmp_path, {})
    if way == "pickle":
        source.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=way == "torch")
    assert run(["convert", str(source), str(tmp_path / "out"), "--from-pickle"]) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if way != "pickle":
        assert "needs more than weights (" in said
        assert "mkdir" in said
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    # The file does what it is meant to where it is opened without care.
    if way == "pickle":
        pickle.loads(source.read_bytes())
        assert mark.exists()


def test_without_the_flag_no_pickle_is_opened(tmp_path: Path, capsys: Any) -> None:
    source = pickled(tmp_path, halton())
    for path in (source, source.rename(tmp_path / "weights")):
        if path.exists():
            assert run(["convert", str(path), str(tmp_path / "out"), "--config",
                        str(tmp_path / "config.json")]) == 4  # fmt: skip
            assert "--from-pickle" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "scalar", [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True), np.str_("x")]
)
def test_a_scalar_of_numpy_beside_the_weights_is_inert(scalar: object, tmp_path: Path) -> None:
    state = {"w": torch.ones(2)}
    content = read_pickle(pickled(tmp_path, {"model": state, "best": scalar, "args": [scalar]}))
    assert torch.equal(weights_in(content)[0]["w"], state["w"])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02."])
def test_a_damaged_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    source = pickled(tmp_path, {})
    source.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.ckpt") as caught:
        read_pickle(source)
    assert "\n" not in str(caught.value)
    torch.save(halton(), source)
    source.write_bytes(source.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        read_pickle(source)


def test_weights_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    state = halton()
    del state["last_norm.mlp.1.bias"]
    with pytest.raises(CheckpointError, match=r"last\.ckpt: tensors missing: last_norm\.mlp"):
        convert(pickled(tmp_path, {"model": state}), tmp_path / "out", from_pickle=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "last.ckpt"]


def test_averages_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    state = halton()
    averages = {name: x + 1 for name, x in state.items()}
    source = pickled(tmp_path, {"model": state, "ema": averages})
    convert(source, tmp_path / "plain", from_pickle=True)
    done = convert(source, tmp_path / "ema", from_pickle=True, ema=True)
    plain, averaged = (load_file(tmp_path / at / "model.safetensors") for at in ("plain", "ema"))
    assert all(torch.equal(averaged[name], plain[name] + 1) for name in plain)
    assert done.dropped == ["model"]
    with pytest.raises(CheckpointError, match="no averages"):
        weights_in({"model": state}, ema=True)


def test_a_list_of_averages_is_matched_to_the_parameters_in_order() -> None:
    state = {"backbone.a": torch.zeros(2), "backbone.table": torch.ones(3),
             "backbone.b": torch.zeros(4)}  # fmt: skip
    content = {"state_dict": state, "ema": {"shadow_params": [torch.ones(2), torch.ones(4)]}}
    found, dropped = weights_in(content, ema=True, names={"backbone.a", "backbone.b"})
    assert [float(x.sum()) for x in found.values()] == [2.0, 3.0, 4.0]
    assert list(found) == list(state)
    assert dropped == ["state_dict"]
    with pytest.raises(CheckpointError, match="2 averages do not fit the 3 parameters"):
        weights_in(content, ema=True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.zeros(2), "holds a Tensor"),
        ({"epoch": 3}, "no tensors; its keys: epoch"),
        ({"model": {"module.a": torch.ones(1), "a": torch.ones(1)}}, "'a' is there twice"),
    ],
)
def test_what_is_no_state_dict_is_refused(content: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        weights_in(content)


def test_the_config_is_found_named_or_refused(tmp_path: Path) -> None:
    source = pickled(tmp_path, halton())
    with pytest.raises(ConfigError, match="did you mean 'taming'"):
        convert(source, tmp_path / "out", from_pickle=True, family="tamin")
    with pytest.raises(CheckpointError, match="of no known family: give --family"):
        convert(source, tmp_path / "out", from_pickle=True, family="taming")
    config = json.loads((tmp_path / "config.json").read_text())
    both = {"model": {"mlm_model": config,
                      "vq_model": json.loads((GOLDEN / "maskbit_tokenizer" / "config.json").read_text())}}  # fmt: skip  # noqa: E501
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
    with pytest.raises(CheckpointError, match="halton_transformer or maskbit: give --family"):
        convert(source, tmp_path / "out", from_pickle=True, config=tmp_path / "both.yaml")
    convert(source, tmp_path / "out", from_pickle=True, config=tmp_path / "both.yaml",
            family="halton_transformer")  # fmt: skip
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, tmp_path / "out", from_pickle=True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="give --config FILE"):
        convert(source, tmp_path / "other", from_pickle=True)
    # A config without a mark of its own is the named family's.
    (tmp_path / "plain.json").write_text(json.dumps({**config, "architectures": None}))
    convert(source, tmp_path / "other", from_pickle=True, config=tmp_path / "plain.json")


def test_a_codec_is_put_beside_a_generator(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "generator").mkdir()
    codec = pickled(tmp_path / "tokenizer", golden_weights("maskbit_tokenizer"),
                    golden="maskbit_tokenizer")  # fmt: skip
    convert(codec, tmp_path / "codec", from_pickle=True)
    weights = load_file(GOLDEN / "maskbit_lfqbert" / "model.safetensors")
    source = pickled(tmp_path / "generator", weights, golden="maskbit_lfqbert")
    convert(source, tmp_path / "model", from_pickle=True, codec=tmp_path / "codec")
    made = mdiff.load(tmp_path / "model", device="cpu").generate({"label": "2"}, sampler="halton")
    assert made[0].output.size == (16, 16)
    with pytest.raises(CheckpointError, match="expected the folder of a codec"):
        convert(source, tmp_path / "again", from_pickle=True, codec=tmp_path / "generator")
