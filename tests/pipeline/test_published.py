"""Models of other projects: which family, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from folders import GOLDEN as GOLDEN
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import mdiff
from mdiff.cli import run
from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError
from mdiff.files import read_model_files
from mdiff.files.untrusted import read_json
from mdiff.files.weights import load_weights
from mdiff.pipeline.published import built, load_published, recognised, supported

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny published model, to be spoiled."""
    return Path(shutil.copytree(GOLDEN / "mdlm", tmp_path / "model"))


@pytest.fixture
def sharded(folder):
    """The same in several files with an index."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    save_torch_state_dict(tensors, folder, max_shard_size=40_000)
    assert len(list(folder.glob("model-0*.safetensors"))) > 3
    return folder


def configured(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | changes))


def indexed(folder, **names):
    """The index with the files of some tensors changed."""
    index = read_json(folder / INDEX)
    index["weight_map"] |= names
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder, message, capsys):
    """Loading says so in one line and exits with 4."""
    with pytest.raises(CheckpointError, match=message):
        mdiff.load(folder, device="cpu")
    assert run(["generate", str(folder)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")


# which family


def test_a_family_is_found_by_its_architecture_and_not_by_its_model_type(folder):
    configured(folder, model_type="llama")
    assert recognised(read_model_files(folder)) == "mdlm"
    assert {"MDLM", "BD3LM", "DIT"} <= set(supported())
    assert recognised(read_model_files(GOLDEN / "smdm")) == "smdm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MDLMM"]}, "MDLMM, which is not supported; did you mean 'MDLM'"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel, which is not supported; did you mean",
        ),
        ({"architectures": None, "model_type": "mdlm"}, "names no architecture .*not supported"),
        ({"architectures": "MDLM"}, "expected a list of names"),
    ],
)
def test_an_unknown_architecture_is_refused_with_what_is_near(folder, change, message, capsys):
    configured(folder, **change)
    refused(folder, message, capsys)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_dim": 10**9}, {"n_blocks": 10**9}, {"vocab_size": 10**12}, {"hidden_dim": -1},
        {"cond_dim": 1e300}, {"n_heads": True}, {"hidden_dim": 2**18, "n_blocks": 256},
        {"vocab_size": 2**24, "hidden_dim": 2**18},
    ],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_anything_is_allocated(folder, change):
    # The first module on the meta device imports what torch needs there.
    load_published(read_model_files(folder), "mdlm")
    configured(folder, **change)
    start = time.thread_time()
    with pytest.raises(CheckpointError):
        load_published(read_model_files(folder), "mdlm")
    assert time.thread_time() - start < 1


# the files


def test_a_sharded_model_is_the_same_and_is_saved_in_shards_with_an_index(sharded, tmp_path):
    one, several = (
        load_published(read_model_files(at), "mdlm") for at in (GOLDEN / "mdlm", sharded)
    )
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, several.state_dict()[name])
    several.save_pretrained(tmp_path / "saved", max_shard_size=40_000)
    index = read_json(tmp_path / "saved" / INDEX)["weight_map"]
    saved = {
        name: tensor
        for path in (tmp_path / "saved").glob("model-0*.safetensors")
        for name, tensor in load_file(path).items()
    }
    before = load_file(GOLDEN / "mdlm" / "model.safetensors")
    assert index.keys() == saved.keys() == before.keys()
    assert len(set(index.values())) > 3
    assert all(torch.equal(before[name], saved[name]) for name in before)


def test_a_truncated_or_longer_shard_is_refused(sharded, capsys):
    shard = sorted(sharded.glob("model-0*.safetensors"))[1]
    whole = shard.read_bytes()
    for spoiled in (whole[:-8], whole[:12], b"", whole + b"\0" * 8):
        shard.write_bytes(spoiled)
        refused(sharded, "truncated", capsys)


def test_an_altered_header_is_refused(sharded, capsys):
    shard = sorted(sharded.glob("model-0*.safetensors"))[0]
    whole = shard.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1
    changed = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(changed)) + changed + whole[8 + size :])
    refused(sharded, "truncated or altered", capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-00009-of-00009.safetensors", "is missing"),
        ("../outside.safetensors", "expected a plain name inside"),
        ("/etc/passwd", "expected a plain name inside"),
        ("link.safetensors", "leaves"),
    ],
)
def test_an_index_that_names_an_absent_or_outer_file_is_refused(sharded, name, message, capsys):
    save_file({"x": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    indexed(sharded, **{"backbone.blocks.0.norm1.weight": name})
    refused(sharded, message, capsys)


def test_a_tensor_that_is_there_twice_is_refused(sharded, capsys):
    save_file({"backbone.blocks.0.norm1.weight": torch.ones(32)}, sharded / "again.safetensors")
    indexed(sharded, extra="again.safetensors")
    refused(sharded, "is in another file too", capsys)
    # Twice in one file.
    header = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    header += b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (sharded / "again.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    refused(sharded, "occurs twice", capsys)


def test_a_shard_that_is_a_pickle_is_refused(sharded, capsys):
    shard = sorted(sharded.glob("model-0*.safetensors"))[0]
    torch.save({"x": torch.zeros(1)}, shard)
    refused(sharded, "is a pickle", capsys)


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.blocks.0.norm1.weight"]
    tensors["backbone.blocks.1.norm1.weight"] = torch.zeros(33)
    tensors["more"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors")
    files = read_model_files(folder)
    module = built("mdlm", files.config)
    with pytest.raises(CheckpointError) as error:
        load_weights(module, files.headers)
    for said in (
        "missing: backbone.blocks.0.norm1.weight", "unexpected: more",
        "of another shape: backbone.blocks.1.norm1.weight [33], expected [32]",
    ):  # fmt: skip
        assert said in str(error.value)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_a_type_that_torch_lacks_is_refused(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.output_layer.linear.bias"] = torch.zeros(50, dtype=torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "of a type that is not read: backbone.output_layer.linear.bias F8", capsys)


def test_a_name_of_the_hub_without_a_network_exits_with_5(monkeypatch, capsys):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(BackendError, match="the Hub cannot be reached"):
        mdiff.load("somebody/a-model")
    assert run(["generate", "somebody/a-model"]) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_snapshot_of_the_hub_is_links_into_its_cache(tmp_path):
    cache = tmp_path / "models--somebody--mdlm"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (GOLDEN / "mdlm").iterdir():
        shutil.copy(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(cache / "blobs" / path.name)
    assert mdiff.load(snapshot, device="cpu").window == 16


@pytest.mark.parametrize("kind", [torch.int8, torch.int64, torch.bool])
def test_weights_stored_as_whole_numbers_are_refused_and_not_cast(folder, kind, capsys):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("attn_qkv.weight"))
    save_file({**tensors, name: tensors[name].to(kind)}, path, metadata={"format": "pt"})
    refused(folder, "of another type: .*attn_qkv.weight", capsys)


@pytest.mark.parametrize("negative", ["1 99999", "1 " * 60])
def test_a_negative_start_that_does_not_fit_is_refused(negative):
    pipeline = mdiff.load(str(GOLDEN / "llada"), device="cpu")
    with pytest.raises(DataError):
        pipeline.generate("1 2", length=30, negative=negative, guidance_scale=2.0)


def test_a_long_window_is_not_filled_unasked():
    pipeline = mdiff.load(str(GOLDEN / "llada"), device="cpu")
    assert len(pipeline.canvases("1 2 3")[0]) == pipeline.window
    long = dataclasses.replace(pipeline, window=4096)
    assert len(long.canvases("1 2 3")[0]) == 3 + 256
    assert len(long.canvases("1 2 3", length=500)[0]) == 500


def test_a_tokenizer_may_be_named_for_a_checkpoint_without_one(folder, tmp_path, capsys):
    """Its ids and text, from the command line too; a model that has its own refuses one."""
    words = {word: number for number, word in enumerate(["[UNK]", *"abcdefgh"])}
    made = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    path = tmp_path / "words.json"
    made.save(str(path))
    pipeline = mdiff.load(folder, tokenizer=path, device="cpu")
    sample = pipeline.generate("a b c", length=8, seed=1)[0]
    assert sample.tokens[:3] == [1, 2, 3]
    data = tmp_path / "text.txt"
    data.write_text("a b c d e f g h " * 8)
    assert run(["eval", str(folder), "--data", str(data), "--tokenizer", str(path), "--draws", "2",
                "--samples", "0", "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["bits_per_char"] > 0
    with pytest.raises(ConfigError, match="has its own modality"):
        mdiff.load("builtin:shakespeare", tokenizer=path)
