"""Every small file of a model is read once by a load: its JSON files and the headers of weights."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import GOLDEN as GOLDEN
from hashed import golden_weights
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.files import untrusted
from mdiff.modalities.text.modality import text
from mdiff.pipeline import Pipeline

# Their readers read again what they are given.
OTHERS = ("transformers", "tokenizers", "huggingface_hub")
# What the configs of some goldens lack to be loaded without an option.
COMPLETED = {"gidd": {"p_uniform": 0.0}, "llada_moe": {"mask_id": 3}, "llada2_moe": {"mask_id": 3}}
CONFIGS = ("config.json", "pipeline.json")


class Reads:
    """How often our code opens each file and parses each JSON text or header of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder.resolve()
        self.opened: Counter[str] = Counter()
        self.parsed: Counter[str] = Counter()
        plain_open, plain_parse = io.open, untrusted.parse_json

        def opening(file, *options, **more):
            path = Path(os.fspath(file)).resolve() if not isinstance(file, int | bytes) else None
            if path is not None and path.is_relative_to(self.folder) and _is_ours():
                self.opened[path.relative_to(self.folder).as_posix()] += 1
            return plain_open(file, *options, **more)

        def parsing(data, *, origin):
            self.parsed[origin] += 1
            return plain_parse(data, origin=origin)

        monkeypatch.setattr(io, "open", opening)
        monkeypatch.setattr(builtins, "open", opening)
        monkeypatch.setattr(untrusted, "parse_json", parsing)

    def check(self, *, weights: int) -> None:
        """Configs are opened once, and once more where a manifest has their digest."""
        listed = (self.folder / "manifest.json").exists()
        configs = {name: n for name, n in self.opened.items() if Path(name).name in CONFIGS}
        assert configs
        assert set(configs.values()) == {1 + listed}, configs
        again = {name: n for name, n in self.parsed.items() if n > 1}
        assert all(name.endswith(("manifest.json", "codec.json")) for name in again), again
        assert sum(name.startswith("the header of ") for name in self.parsed) == weights


def _is_ours() -> bool:
    """Whether no library's reader is among the callers."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] in OTHERS:
            return False
        frame = frame.f_back
    return True


def own_model(folder: Path) -> Path:
    torch.manual_seed(0)
    modality = text()
    model = transformer(vocab_size=256, max_length=8, width=8, depth=1, heads=2)
    Pipeline(model.eval(), modality.space, modality, window=8).save(folder)
    return folder


def foreign(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 32}
    config = BertConfig(vocab_size=8, num_hidden_layers=1, num_attention_heads=2, **sizes)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def with_codec(folder: Path) -> Path:
    """A generator over a grid with its codec in the folder codec/."""
    shutil.copytree(GOLDEN / "maskbit_lfqbert", folder)
    (folder / "codec").mkdir()
    shutil.copy(GOLDEN / "maskbit_tokenizer" / "config.json", folder / "codec")
    save_file(golden_weights("maskbit_tokenizer"), folder / "codec" / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["shakespeare", "emoji"])
def test_a_builtin_model(name, monkeypatch):
    folder = Path(mdiff.__file__).parent / "builtin" / name
    reads = Reads(folder, monkeypatch)
    mdiff.load(f"builtin:{name}", device="cpu")
    reads.check(weights=2 if name == "emoji" else 1)


def test_the_step_of_a_run(tmp_path, monkeypatch):
    own_model(tmp_path / "step-000002")
    reads = Reads(tmp_path / "step-000002", monkeypatch)
    mdiff.load(tmp_path, device="cpu")
    reads.check(weights=1)


@pytest.mark.parametrize("name", [
    "bd3lm", "dream", "gidd", "halton_transformer", "llada", "llada2_moe", "llada_moe",
    "maskbit_lfqbert", "mdlm", "smdm",
])  # fmt: skip
def test_a_model_of_another_project(name, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | COMPLETED.get(name, {})))
    reads = Reads(folder, monkeypatch)
    mdiff.load(folder, device="cpu")
    reads.check(weights=1)


def test_a_sharded_model_and_a_plan_for_devices(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(GOLDEN / "mdlm" / "config.json", folder)
    tensors = load_file(GOLDEN / "mdlm" / "model.safetensors")
    index = {}
    for part in (0, 1):
        some = dict(list(tensors.items())[part::2])
        save_file(some, folder / f"part-{part}.safetensors")
        index |= dict.fromkeys(some, f"part-{part}.safetensors")
    listed = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(listed)
    reads = Reads(folder, monkeypatch)
    mdiff.load(folder, device="auto")
    reads.check(weights=2)


def test_a_directory_of_several_models(monkeypatch):
    reads = Reads(GOLDEN / "amused", monkeypatch)
    mdiff.load(GOLDEN / "amused", device="cpu")
    reads.check(weights=3)


def test_a_masked_language_model_of_transformers(tmp_path, monkeypatch):
    foreign(tmp_path)
    reads = Reads(tmp_path, monkeypatch)
    mdiff.load(tmp_path, device="cpu", mask_id=4)
    reads.check(weights=1)


def test_a_codec_beside_a_generator(tmp_path, monkeypatch):
    folder = with_codec(tmp_path / "model")
    reads = Reads(folder, monkeypatch)
    assert mdiff.load(folder, device="cpu").modality.name == "image"
    reads.check(weights=2)


def test_what_locate_found_is_not_read_again(tmp_path, monkeypatch):
    from mdiff.files import locate

    own_model(tmp_path / "model")
    reads = Reads(tmp_path / "model", monkeypatch)
    mdiff.load(locate(str(tmp_path / "model")), device="cpu")
    reads.check(weights=1)
