"""aMUSEd in use: pictures, edits, saving and the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from amused_goldens import FOLDER, GOLDEN, PROMPTS, WEIGHTS
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file

import mdiff
from mdiff.cli import run
from mdiff.errors import CheckpointError, ConfigError
from mdiff.modalities.image.codec import load_codec, save_codec
from mdiff.modalities.image.data.images import Pictures
from mdiff.pipeline.pipeline import Pipeline


def test_a_picture_of_a_prompt_does_not_depend_on_the_others(pipeline: Pipeline) -> None:
    options = {"steps": 4, "temperature": 0.0, "guidance_scale": 3.0}
    together = pipeline.generate(list(PROMPTS), **options)
    assert [sample.calls for sample in together] == [8, 8, 8]
    seeds = torch.tensor([sample.seed for sample in together])
    for row, prompt in enumerate(PROMPTS):
        alone = pipeline.generate(prompt, seed=seeds[row, None], **options)
        assert alone[0].tokens == together[row].tokens
        assert alone[0].output.size == (16, 16)
    assert all(0 <= token < 32 for sample in together for token in sample.tokens)


def test_the_prompt_and_the_negative_prompt_have_an_effect(pipeline: Pipeline) -> None:
    def logits(**options: Any) -> float:
        return pipeline.generate("a red cat", steps=2, **options)[0].log_prob

    plain = logits(guidance_scale=4.0)
    assert plain == logits(guidance_scale=4.0, negative="")
    assert plain != logits(guidance_scale=4.0, negative="dog 3, no cat!")
    assert plain != logits()
    assert pipeline.generate("dog", steps=2)[0].log_prob != logits()


def test_what_was_loaded_is_saved_as_it_was(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "saved")
    names = {path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file()}
    for name in names - {Path("golden.safetensors")}:
        before, after = FOLDER / name, tmp_path / "saved" / name
        if name.suffix == ".safetensors":
            old, new = load_file(before), load_file(after)
            assert old.keys() == new.keys()
            assert all(torch.equal(old[k], new[k]) and old[k].dtype == new[k].dtype for k in old)
        elif name.parent.name == "text_encoder":
            old, new = json.loads(before.read_text()), json.loads(after.read_text())
            # transformers writes its own version.
            assert {**old, "transformers_version": 0} == {**new, "transformers_version": 0}
        elif name.suffix == ".json":
            assert json.loads(before.read_text()) == json.loads(after.read_text())
        else:
            assert before.read_bytes() == after.read_bytes()
    again = mdiff.load(tmp_path / "saved")
    assert again.generate("dog", steps=2)[0].tokens == pipeline.generate("dog", steps=2)[0].tokens


def test_half_precision_is_saved_as_it_came(copy: Path, tmp_path: Path) -> None:
    for part in ("transformer", "vqvae"):
        path = copy / part / WEIGHTS
        save_file({k: v.half() for k, v in load_file(path).items()}, path, {"format": "pt"})
    made = mdiff.load(copy)
    assert made.modality.codec.quant_conv.weight.dtype == torch.float32
    made.save(tmp_path / "saved")
    for part in ("transformer", "vqvae"):
        old, new = (load_file(f / part / WEIGHTS) for f in (copy, tmp_path / "saved"))
        assert all(torch.equal(old[k], new[k]) and new[k].dtype == torch.float16 for k in old)


def test_a_picture_scores_under_its_words(pipeline: Pipeline) -> None:
    picture = pipeline.generate("a red cat", steps=2)[0].output
    items = {"image": picture, "caption": "a red cat"}, {"image": picture}, picture
    nats = [float(pipeline.score([item], draws=4).nats) for item in items]
    assert nats[0] != nats[1] == nats[2]


def test_an_edit_keeps_what_is_outside_of_the_mask(pipeline: Pipeline) -> None:
    picture = pipeline.generate("a red cat", steps=2)[0].output
    made = pipeline.edit(picture, "0:4,0:4", given={"caption": "dog"}, steps=2)[0].output
    before, after = np.array(picture), np.array(made)
    assert (before[4:] == after[4:]).all()
    assert (before[:, 4:] == after[:, 4:]).all()


def test_a_prompt_that_is_cut_is_said_to_be(pipeline: Pipeline, caplog: Any) -> None:
    length = pipeline.modality.encoder.length
    pipeline.generate(["cat", "a b c d " * length], steps=1)
    assert caplog.messages == [f"1 caption is cut at {length} tokens"]
    caplog.clear()
    pictures = Pictures(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), list("abc"), None, [],
                        ["cat", "x y " * length, "z " * 2 * length])  # fmt: skip
    rows = pipeline.modality.examples(pictures, split="all")
    assert caplog.messages == [f"2 captions are cut at {length} tokens"]
    rows.batch(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert len(caplog.messages) == 1


def test_what_an_edit_makes_depends_on_the_surroundings(pipeline: Pipeline) -> None:
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(4)]
    options: dict[str, Any] = {"given": {"caption": "cat"}, "steps": 4}
    made = [pipeline.edit(each, "0:4,0:4", **options)[0] for each in pictures]
    inside = {np.asarray(each.output)[:4, :4].tobytes() for each in made}
    assert len(inside) == len(pictures)
    codec = pipeline.modality.codec
    ids = codec.encode(torch.from_numpy(pictures[0]).permute(2, 0, 1)[None]).flatten().tolist()
    side = 16 // codec.stride
    outside = [n for n in range(side**2) if n // side * codec.stride >= 4]
    assert [made[0].tokens[n] for n in outside] == [ids[n] for n in outside]


def test_the_command_line_generates_inspects_edits_and_evaluates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: Any) -> str:
        assert run([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    out, folder = tmp_path / "fruit.png", tmp_path / "made"
    asked = ("generate", FOLDER, "--prompt", "a bowl of fruit")
    said(*asked, "--steps", 12, "--out", out, "--guidance-scale", 10, "--negative-prompt", "dog",
         "--trace", tmp_path / "trace.html")  # fmt: skip
    assert Pillow.open(out).size[0] >= 16
    assert json.loads(said(*asked, "--out", f"{folder}/", "--json"))["calls"] == 12
    (made,) = folder.glob("*.png")
    said("edit", FOLDER, made, "--mask", "0:4,0:4", "--prompt", "cat", "--out", tmp_path / "e.png")
    report = json.loads(said("inspect", FOLDER, "--json"))
    assert report["not_used"] == []
    assert {tensor["used"] for tensor in report["tensors"]} == {"loaded"}
    assert {tensor["name"].split("/")[0] for tensor in report["tensors"]} == {
        "transformer", "vqvae", "text_encoder",
    }  # fmt: skip
    scored = said("eval", FOLDER, "--data", folder, "--draws", 2, "--split", "all", "--json")
    assert json.loads(scored)["bounds"][0]["bits_per_token"] > 0


def test_a_snapshot_of_the_hub_is_made_of_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--amused--amused-256"
    folder = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in FOLDER.rglob("*") if path.is_file()):
        blob = shutil.copy(path, cache / "blobs" / str(number))
        link = folder / path.relative_to(FOLDER)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert mdiff.load("amused/amused-256").generate("dog", steps=1)[0].calls == 1
    assert mdiff.load(str(folder)).space.vocab_size == 32
    # A link that leads out of the cache is not followed.
    weights = next((folder / "transformer").glob("*.safetensors"))
    outside = shutil.copy(weights, tmp_path / "outside.safetensors")
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(CheckpointError, match="a link that leaves"):
        mdiff.load(str(folder))


def test_the_codec_alone_saves_in_the_layout_of_codecs(pipeline: Pipeline, tmp_path: Path) -> None:
    codec = pipeline.modality.codec
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    ids = GOLDEN["vq.random_indices"]
    assert torch.equal(again.decode(ids), codec.decode(ids))
    assert again.config() == codec.config()
    with pytest.raises(ConfigError, match="not trained here"):
        codec.fit(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
