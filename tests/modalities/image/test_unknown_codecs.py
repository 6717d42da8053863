"""Folders of codecs that do not open here: what was found is said, and which codecs open."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mdiff
from mdiff.cli import run
from mdiff.errors import CheckpointError
from mdiff.modalities.image import (
    make_codec,
    published_codec_of,
    published_codecs,
    unknown_codec,
)
from mdiff.pipeline.conversion import convert

TITOK = {
    "codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "num_latent_tokens": 32,
    "vit_enc_model_size": "large", "vit_enc_patch_size": 16, "vit_dec_patch_size": 16,
}  # fmt: skip
# The config.json of a folder, and what the line says of it.
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "titok": ({"experiment": {}, "model": {"vq_model": TITOK}}, "num_latent_tokens=32"),
    "titok_with_generator": (
        {"model": {"vq_model": TITOK | {"num_latent_tokens": 64}, "generator": {"depth": 24}}},
        "num_latent_tokens=64",
    ),
    "titok_flat": (TITOK | {"num_latent_tokens": 128}, "num_latent_tokens=128"),
    "titok_odd": (TITOK | {"num_latent_tokens": "x\ny" * 99}, "TiTok"),
    "vq_model": ({"model": {"vq_model": {"codebook_size": 1024}}}, "keys vq_model"),
    "diffusers_vq": ({"_class_name": "VQModel", "act_fn": "silu"}, "class VQModel"),
    "kl": ({"_class_name": "AutoencoderKL", "latent_channels": 4}, "class AutoencoderKL"),
    "tiny": ({"_class_name": "AutoencoderTiny"}, "class AutoencoderTiny"),
    "dc": ({"_class_name": "AutoencoderDC", "attention_head_dim": 32}, "class AutoencoderDC"),
    "emu3": ({"architectures": ["Emu3VisionVQModel"]}, "class Emu3VisionVQModel"),
    "vqvae": ({"model_type": "chameleon_vqgan", "num_embeddings": 8192}, "chameleon_vqgan"),
    "magvit": ({"target": "magvit2.LFQModel", "params": {"n_embed": 8}}, "magvit2.LFQModel"),
    "gumbel_like": ({"embed_dim": 256, "n_embed": 8192}, "keys n_embed"),
    "ldm": ({"first_stage": {"ddconfig": {"z_channels": 4}}}, "keys ddconfig, z_channels"),
    "named_in_lines": ({"_class_name": "VAE\nof\x1b[31m two lines"}, "class VAE of"),
}
# Configs of no codec: models of text or of pictures, also with a codec inside.
OTHERS = [
    {"architectures": ["LlamaForImages"], "model_type": "llama"},
    {"architectures": ["ChameleonForCausalLM"], "vq_config": {"z_channels": 4}},
    {"model_type": "cosmos", "hidden_size": 8},
    {"_class_name": "UNet2DModel", "in_channels": 3},
    {"hidden_size": 8},
]


def folder_of(config: dict[str, Any], folder: Path, *more: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"encoder.latent_tokens": torch.zeros(2)}, folder / "model.safetensors")
    for name in more:
        (folder / name).write_text("{}")
    return folder


def line_of(arguments: list[str], capsys: Any) -> str:
    """What a command refuses, in one line."""
    assert run(arguments) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    return str(lines[0])


def assert_named(line: str, said: str) -> None:
    assert said in line
    assert line.isprintable()
    for name in ("levels", "kmeans", "vq", "bits", *published_codecs()):
        assert name in line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_codec_that_does_not_open_is_named_by_every_command(
    layout: str, tmp_path: Path, capsys: Any
) -> None:
    config, said = LAYOUTS[layout]
    folder = str(folder_of(config, tmp_path / "it", "tokenizer_notes.txt"))
    commands = (["tokenizer", "inspect"], ["tokenizer", "encode"], ["inspect"], ["generate"],
                ["eval"])  # fmt: skip
    for command in commands:
        more = ["--out", "x"] if command[-1] == "encode" else []
        more = ["--data", folder] if command[-1] == "eval" else more
        assert_named(line_of([*command, folder, *more], capsys), said)
    for load in (mdiff.load_codec, make_codec, mdiff.load):
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert_named(str(caught.value), said)


def test_a_codec_beside_a_model_and_one_to_be_converted_are_named(tmp_path: Path) -> None:
    config, said = LAYOUTS["titok"]
    codec = folder_of(config, tmp_path / "codec")
    with pytest.raises(CheckpointError) as caught:
        convert(codec / "model.safetensors", tmp_path / "out", codec=codec)
    assert_named(str(caught.value), said)
    with pytest.raises(CheckpointError, match=r"TiTok.*give --family, one of .*taming"):
        convert(codec / "model.safetensors", tmp_path / "out")


def test_weights_in_a_pickle_or_none_change_nothing(tmp_path: Path, capsys: Any) -> None:
    config, said = LAYOUTS["titok"]
    folder = folder_of(config, tmp_path / "it")
    (folder / "model.safetensors").unlink()
    assert_named(line_of(["generate", str(folder)], capsys), said)
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    for command in (["generate"], ["tokenizer", "inspect"]):
        assert_named(line_of([*command, str(folder)], capsys), said)


@pytest.mark.parametrize("files", [[], ["config.yaml", "model.safetensors"], ["titok.bin"]])
def test_a_folder_without_a_config_is_named_by_its_files(files: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("x")
    for load in (mdiff.load_codec, make_codec):
        with pytest.raises(CheckpointError, match=f"found: {', '.join(files) or 'nothing'};") as e:
            load(tmp_path)
        assert_named(str(e.value), "codec.json is missing")


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_a_model_is_not_taken_for_a_codec(number: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not supported") as caught:
        mdiff.load(folder_of(OTHERS[number], tmp_path / "it"))
    assert "codec" not in str(caught.value)


def test_a_codec_is_known_by_all_of_its_keys_alone():
    for name, keys in published_codecs().items():
        nested = [key.removeprefix("params.") for key in keys if key.startswith("params.")]
        own = {key: 1 for key in keys if not key.startswith("params.")}
        described = own | ({"params": dict.fromkeys(nested, 1)} if nested else {})
        assert published_codec_of(described) == name
        for key in own:
            assert published_codec_of({k: v for k, v in described.items() if k != key}) is None
    assert published_codec_of({"params": {"embed_dim": 1}}) is None


def test_a_folder_that_holds_a_codec_holds_no_unknown_one(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "MagvitTokenizer"}')
    assert "the class MagvitTokenizer" in str(unknown_codec(tmp_path))
    (tmp_path / "codec.json").write_text('{"name": "levels"}')
    assert unknown_codec(tmp_path) is None
