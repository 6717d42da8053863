"""What is small and would become large is refused before it does."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM

import mdiff.files.untrusted as files
import mdiff.modalities.image.data.pixels as picture_files
import mdiff.modalities.text.documents as sources
import mdiff.modalities.text.tables as tables
from mdiff.backbones.transformer import transformer
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.untrusted import read_json, read_tensors
from mdiff.modalities.image.data.images import read_pictures
from mdiff.modalities.image.data.pixels import open_picture
from mdiff.modalities.text.documents import Source
from mdiff.pipeline.loading import load


def test_an_archive_that_grows_too_much_is_refused_and_a_large_text_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_UNPACKED", 2**20)
    bomb, text = tmp_path / "bomb.txt.gz", tmp_path / "text.txt.gz"
    bomb.write_bytes(gzip.compress(b"a" * 2**22))
    random_ = np.random.default_rng(0)
    words = bytes(random_.choice(np.frombuffer(b"etaoin shrdlu", np.uint8), 2**21))
    text.write_bytes(gzip.compress(words, 1))
    with pytest.raises(DataError, match=r"bomb\.txt\.gz unpacks to over 50 times its size"):
        Source.of(str(bomb)).documents()
    assert Source.of(str(text)).documents() == [words.decode()]
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((2**12, 32, 32), np.uint8))
    with pytest.raises(DataError, match="times its size"):
        read_pictures(str(tmp_path / "x.npz"), channels=1)


def test_a_line_of_json_has_a_limit_and_says_what_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_OF_A_LINE", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * 200}) + "\n")
    with pytest.raises(DataError, match=r"line 2 .* at most 100 are read.*a \.txt file may be"):
        Source.of(str(path)).documents()


def test_json_of_too_many_values_and_files_of_too_many_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "COUNTED_FROM", 100)
    monkeypatch.setattr(files, "MAX_JSON_VALUES", 60)
    (tmp_path / "x.json").write_text(json.dumps({"a": [[]] * 40}))
    with pytest.raises(CheckpointError, match="over 60 commas and brackets"):
        read_json(tmp_path / "x.json")
    (tmp_path / "y.json").write_text(json.dumps({"a": "x" * 200}))
    assert len(read_json(tmp_path / "y.json")["a"]) == 200
    monkeypatch.setattr(files, "MAX_JSON_VALUES", 10**6)
    monkeypatch.setattr(files, "MAX_TENSORS", 3)
    save_file({str(i): torch.zeros(1) for i in range(4)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="4 tensors: at most 3 are read"):
        read_tensors(tmp_path / "x.safetensors")


def test_pictures_have_a_limit_and_large_ones_are_read_in_parts(tmp_path, monkeypatch):
    random_ = np.random.default_rng(1)
    pixels = random_.integers(0, 256, (70, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "x.png")
    whole = read_pictures(str(tmp_path / "x.png"), channels=3).pixels
    monkeypatch.setattr(picture_files, "ROWS_AT_ONCE", 16)
    assert torch.equal(read_pictures(str(tmp_path / "x.png"), channels=3).pixels, whole)
    monkeypatch.setattr(picture_files, "MAX_FILE_BYTES", 50)
    with pytest.raises(DataError, match="more than 50"):
        open_picture(tmp_path / "x.png")


def test_settings_of_far_more_weights_than_the_files_hold_are_refused_first(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    transformer(vocab_size=8, width=8, depth=1, heads=2, max_length=4).save_pretrained(own)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "max_position_embeddings": 8}
    bert = BertConfig(vocab_size=8, num_hidden_layers=1, num_attention_heads=2, **sizes)
    BertForMaskedLM(bert).save_pretrained(other)
    for folder, message in (
        (own, r"tensors of another shape: embedding.weight \[9, 8\], expected \[100000000, 8\]"),
        (other, r"describes [\d,]+ weights, the files hold"),
    ):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10**8}))
        with pytest.raises(CheckpointError, match=message):
            load(str(folder), mask_id=7)


def test_a_recipe_has_a_limit(tmp_path):
    from mdiff.training.recipe import MAX_RECIPE_BYTES, load_recipe

    (tmp_path / "x.yaml").write_text("a: " + "b" * MAX_RECIPE_BYTES)
    with pytest.raises(ConfigError, match="more than 65536 bytes"):
        load_recipe(tmp_path / "x.yaml")
