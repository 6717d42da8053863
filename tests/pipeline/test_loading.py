"""load and save, on tiny models made here: what comes back, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_text import WINDOW, tiny
from transformers import BertConfig, BertForMaskedLM

from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError
from mdiff.files.locate import snapshot
from mdiff.pipeline.loading import load
from mdiff.schedule import Polynomial
from mdiff.tokens import TokenSpace


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny().save(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_saved_pipeline_comes_back(saved: Path) -> None:
    first, again = tiny(), load(saved)
    assert (again.space, again.schedule, again.window) == (first.space, Polynomial(3.0), WINDOW)
    assert again.generate("x", seed=3)[0].tokens == first.generate("x", seed=3)[0].tokens
    assert load(saved, dtype="bfloat16").denoiser.dtype == torch.bfloat16  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="exists already"):
        first.save(saved)


def test_a_run_directory_gives_its_latest_complete_step(saved: Path, tmp_path: Path) -> None:
    for step in ("step-000002", "step-000010", "step-000030"):
        shutil.copytree(saved, tmp_path / step)
    (tmp_path / "step-000030" / "config.json").unlink()
    from mdiff.files.locate import locate

    assert locate(str(tmp_path)).folder.name == "step-000010"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model.safetensors", lambda raw: raw[:-40], "model.safetensors has"),
        ("model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "was altered"),
        ("config.json", lambda raw: raw.replace(b"16", b"17"), "config.json"),
        ("pipeline.json", lambda raw: raw + b" ", "pipeline.json"),
        ("manifest.json", lambda raw: b"{}", "manifest.json"),
        ("manifest.json", lambda raw: raw.replace(b"config.json", b"../onfig.json"), "onfig"),
        ("extra.safetensors", lambda raw: b"\x80\x02", "not in the manifest"),
    ],
)
def test_an_altered_checkpoint_is_refused(
    copied: Path, file: str, change: Any, message: str
) -> None:
    path = copied / file
    path.write_bytes(change(path.read_bytes() if path.exists() else b""))
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def remade(folder: Path, change: Any) -> None:
    """Change pipeline.json and make the manifest agree, as one who forges would."""
    from mdiff.files.atomic import staged

    described = json.loads((folder / "pipeline.json").read_text())
    change(described)
    (folder / "pipeline.json").write_text(json.dumps(described))
    (folder / "manifest.json").unlink()
    aside = folder.rename(folder.with_name("aside"))
    with staged(folder) as inner:
        shutil.copytree(aside, inner, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda d: d.update(backbone="os:system"), CheckpointError, "not a part of mdiff"),
        (lambda d: d["modality"].update(name="os:getcwd"), CheckpointError, "not a part"),
        (lambda d: d["modality"].update(eos=True), DataError, "257 ids, the model 256"),
        (lambda d: d["modality"].update(color=1), CheckpointError, "color"),
        (lambda d: d["space"].update(vocab_size=0), CheckpointError, "vocab_size=0"),
        (lambda d: d["schedule"].update(name="linea"), CheckpointError, "did you mean 'linear'"),
        (lambda d: d.update(format=9), CheckpointError, "expected format 1"),
        (lambda d: d.update(length="long"), CheckpointError, "length='long'"),
        (lambda d: d.pop("space"), CheckpointError, "space"),
    ],
)
def test_an_invalid_description_is_refused(
    copied: Path, change: Any, kind: type[Exception], message: str
) -> None:
    remade(copied, change)
    with pytest.raises(kind, match=message):
        load(copied)


def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside\.safetensors"):
        load(tmp_path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load(tmp_path)


def bert(folder: Path, *, tokenizer: bool) -> Path:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "moon", "##s"]
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(words))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def test_any_hugging_face_masked_language_model_loads(tmp_path: Path) -> None:
    pipeline = load(bert(tmp_path, tokenizer=True))
    assert pipeline.space == TokenSpace(8, mask_id=4)
    assert pipeline.window == 32
    (sample,) = pipeline.generate("the moons", length=6)
    assert sample.tokens[:3] == [5, 6, 7]
    assert 4 not in sample.tokens
    assert str(sample).startswith("the moons")


def test_without_a_tokenizer_the_modality_is_plain_ids(tmp_path: Path) -> None:
    bert(tmp_path, tokenizer=False)
    with pytest.raises(ConfigError, match="give mask_id="):
        load(tmp_path)
    pipeline = load(tmp_path, mask_id=4)
    (sample,) = pipeline.generate([[5, 6]], length=4)
    assert sample.tokens[:2] == [5, 6]
    assert pipeline.infill("7 _ _ 5")[0].output.startswith("7 ")
    with pytest.raises(DataError, match="token ids"):
        pipeline.generate("moon", length=3)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    bert(tmp_path, tokenizer=True)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("\nsun\nstar")
    with pytest.raises(DataError, match="the tokenizer has 10 ids, the model 8"):
        load(tmp_path)


def test_a_model_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(bert(tmp_path, tokenizer=True) / "model.safetensors")
    weights.pop("bert.embeddings.word_embeddings.weight")
    weights.pop("cls.predictions.decoder.weight", None)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing keys"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("builtin:nothing", ConfigError, "no builtin model"),
        ("./nowhere", CheckpointError, "no such directory"),
        ("/no/where", CheckpointError, "no such directory"),
        ("a b", CheckpointError, "no such directory"),
    ],
)
def test_a_name_that_is_no_model_says_what_was_expected(
    name: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        load(name)


def test_options_of_load_are_checked(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        load(saved, dtype="flaot32")
    with pytest.raises(ConfigError, match="unknown device"):
        load(saved, device="gpuu")
    with pytest.raises(ConfigError, match="not a block model"):
        load(saved, block_length=4)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            load(saved, device="cuda")
    with pytest.raises(CheckpointError, match="is a file"):
        load(saved / "config.json")
    with pytest.raises(CheckpointError, match="holds no model"):
        load(tmp_path)


def test_the_hub_out_of_reach_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(BackendError, match="cannot be reached: no route"):
        load("someone/something")


def test_a_snapshot_of_the_hub_is_checked_through_its_links(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folder.mkdir(parents=True)
    shutil.copytree(saved, blobs)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert load("someone/something").window == WINDOW
    weights = blobs / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="not the file that the manifest lists"):
        snapshot(folder)
    weights.rename(tmp_path.parent / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path.parent / "outside.safetensors")
    with pytest.raises(CheckpointError, match="link that leaves"):
        snapshot(folder)


def test_a_hub_id_may_name_a_revision(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_of(name: str, *, revision: str | None, **_: Any) -> str:
        asked.append((name, revision))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_of)
    load("someone/something@v1.0")
    load("someone/something")
    assert asked == [("someone/something", "v1.0"), ("someone/something", None)]
