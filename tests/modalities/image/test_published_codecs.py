"""Codecs of other projects against their official code, and what their files must be."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hashed import GOLDEN, golden_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdiff.cli import run
from mdiff.errors import CheckpointError
from mdiff.modalities.image.codec import load_codec, make_codec, save_codec
from mdiff.modalities.image.codecs.maskbit import maskbit
from mdiff.modalities.image.data.token_shards import fingerprint

GOLDENS = {
    "vqgan_taming": "taming",
    "vq_llamagen": "llamagen",
    "maskbit_tokenizer": "maskbit",
}
# Absolute, on latents and pixels; stated beside the goldens.
TOLERANCE = 2e-4
over_every_golden = pytest.mark.parametrize("golden", GOLDENS)


@cache
def weights(golden: str) -> dict[str, Tensor]:
    return golden_weights(golden)


def outputs(golden: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / golden / "golden.safetensors")


def folder_of(golden: str, folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """The checkpoint as it is published: config.json and model.safetensors."""
    folder.mkdir(exist_ok=True)
    shutil.copy(GOLDEN / golden / "config.json", folder)
    save_file(weights(golden) if tensors is None else tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=GOLDENS)
def loaded(request: Any, tmp_path_factory: Any) -> tuple[str, Path, Any]:
    folder = folder_of(request.param, tmp_path_factory.mktemp("codec") / "it")
    return request.param, folder, load_codec(folder)


def test_every_step_is_that_of_the_official_code(loaded: tuple[str, Path, Any]) -> None:
    golden, _, codec = loaded
    truth = outputs(golden)
    assert codec.name == GOLDENS[golden]
    latents = codec.latents(truth["pixels"])
    assert float((latents - truth["latents"]).abs().max()) <= TOLERANCE
    ids = codec.ids(latents)
    assert torch.equal(ids, truth["indices"])
    codes = codec.codes(ids)
    assert torch.allclose(codes, truth["quantized"], rtol=0, atol=1e-6)
    back = codec.pictures(codes)
    assert float((back - truth["reconstruction"]).abs().max()) <= TOLERANCE
    again = codec.pictures(codec.codes(truth["random_indices"]))
    assert float((again - truth["decoded_random_indices"]).abs().max()) <= TOLERANCE


def test_a_pictures_ids_and_pixels_do_not_depend_on_its_batch(
    loaded: tuple[str, Path, Any],
) -> None:
    codec, counts = loaded[2], []
    hooks = [
        network.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
        for network in (codec.encoder, codec.decoder)
    ]
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 32, 32), generator=random, dtype=torch.uint8)
    ids = codec.encode(images)
    pictures = codec.decode(ids)
    for hook in hooks:
        hook.remove()
    # A batch rounds otherwise, which shows only where two codes are about as near.
    assert set(counts) == {1}
    for i in range(6):
        assert torch.equal(codec.encode(images[i : i + 1])[0], ids[i])
        assert torch.equal(codec.decode(ids[i : i + 1])[0], pictures[i])


def test_whole_pixels_pass_through_the_same_steps(loaded: tuple[str, Path, Any]) -> None:
    golden, _, codec = loaded
    ids = outputs(golden)["random_indices"]
    float_pictures = outputs(golden)["decoded_random_indices"]
    unit = (float_pictures + 1) / 2 if codec.signed else float_pictures
    shown = (unit * 255).clamp(0, 255)
    assert int((codec.decode(ids).float() - shown).abs().max()) <= 0.5 + 255 * TOLERANCE
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert torch.equal(codec.encode(white), codec.ids(codec.latents(torch.ones(1, 3, 16, 16))))


def test_what_is_loaded_is_saved_bit_for_bit(loaded: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, folder, codec = loaded
    codec.save_pretrained(tmp_path / "again")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_files_of_our_own_hold_the_same_codec(
    loaded: tuple[str, Path, Any], tmp_path: Path
) -> None:
    _, _, codec = loaded
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    assert fingerprint(again) == fingerprint(codec)


@over_every_golden
def test_a_wrong_set_of_tensors_is_refused_by_name(golden: str, tmp_path: Path) -> None:
    tensors = weights(golden)
    name = "encoder.conv_in.weight"
    fewer = {key: x for key, x in tensors.items() if key != name}
    wrong = {
        f"missing: {name}": fewer,
        "unexpected: loss.logvar": tensors | {"loss.logvar": torch.zeros(1)},
        f"of another shape: {name}": fewer | {name: tensors[name][:, :1].contiguous()},
    }
    for number, (said, bad) in enumerate(wrong.items()):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_codec(folder_of(golden, tmp_path / str(number), bad))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("golden", "more"),
    [
        ("vq_llamagen", {"quantize.codebook_used": torch.arange(65536.0)}),
        (
            "maskbit_tokenizer",
            {
                "quantize.bits_to_indices": 2 ** torch.arange(6, dtype=torch.int32),
                "quantize.codebook": torch.ones(64, 6),
            },
        ),
    ],
)
def test_buffers_that_nothing_reads_are_kept(
    golden: str, more: dict[str, Tensor], tmp_path: Path
) -> None:
    codec = load_codec(folder_of(golden, tmp_path / "with", weights(golden) | more))
    codec.save_pretrained(tmp_path / "again")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in more.items())
    # They are no part of what an id means.
    assert fingerprint(codec) == fingerprint(load_codec(folder_of(golden, tmp_path / "without")))


@pytest.mark.parametrize(
    ("golden", "change", "said"),
    [
        ("vqgan_taming", {"target": "taming.models.vqgan.GumbelVQ"}, "target"),
        ("vqgan_taming", {"params": {"ddconfig": {}}}, "double_z|in_channels"),
        ("vqgan_taming", {"params": {"ddconfig": 3}}, "params.ddconfig"),
        ("vq_llamagen", {"decoder_ch_mult": [1, 1]}, "decoder_ch_mult"),
        ("vq_llamagen", {"codebook_size": 10**12}, "codebook_size"),
        ("vq_llamagen", {"encoder_ch_mult": [10**9]}, "encoder_ch_mult"),
        ("maskbit_tokenizer", {"quantizer_type": "lookup"}, "quantizer_type"),
        ("maskbit_tokenizer", {"model_class": "taming"}, "model_class"),
        ("maskbit_tokenizer", {"hidden_channels": 33}, "33 channels"),
        ("maskbit_tokenizer", {"token_size": 60}, "token_size"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_its_entry(
    golden: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = folder_of(golden, tmp_path / "it", {"x": torch.zeros(1)})
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        load_codec(folder)


def test_a_folder_of_something_else_is_refused_with_the_keys_that_are_known(
    tmp_path: Path,
) -> None:
    folder = folder_of("vq_llamagen", tmp_path / "it", {"x": torch.zeros(1)})
    (folder / "config.json").write_text(json.dumps({"hidden_size": 3}))
    with pytest.raises(CheckpointError, match=r"hidden_size; known: .*ddconfig"):
        load_codec(folder)
    both = json.loads((GOLDEN / "vq_llamagen" / "config.json").read_text())
    both |= json.loads((GOLDEN / "maskbit_tokenizer" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(both))
    with pytest.raises(CheckpointError, match="llamagen or of maskbit"):
        load_codec(folder)


def test_absurd_sizes_in_files_of_our_own_take_no_memory(tmp_path: Path) -> None:
    codec = load_codec(folder_of("vqgan_taming", tmp_path / "it"))
    save_codec(codec, tmp_path)
    settings = json.loads((tmp_path / "codec.json").read_text())
    settings["config"]["params"] |= {"n_embed": 1 << 24, "embed_dim": 1 << 18}
    (tmp_path / "codec.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"shape .*16777216"):
        load_codec(tmp_path)


def test_pictures_become_tokens_and_pictures_again_on_the_command_line(tmp_path: Path) -> None:
    from PIL import Image

    folder = folder_of("maskbit_tokenizer", tmp_path / "codec")
    Image.new("RGB", (16, 16), (200, 30, 90)).save(tmp_path / "a.png")
    line = ["tokenizer", "encode", str(folder), str(tmp_path / "a.png"), "--workers", "1"]
    assert run([*line, "--out", str(tmp_path / "tokens")]) == 0
    line = ["tokenizer", "decode", str(folder), str(tmp_path / "tokens"), "--out"]
    assert run([*line, f"{tmp_path / 'back'}/"]) == 0
    (back,) = (tmp_path / "back").glob("*.png")
    assert Image.open(back).size == (16, 16)


def test_bits_in_groups_are_the_generator_s_splits_and_decode_alike(tmp_path: Path) -> None:
    codec = load_codec(folder_of("maskbit_tokenizer", tmp_path / "it"))
    halves = codec.in_groups(2)
    assert (halves.codes_per_position, halves.codebook_size, halves.stride) == (2, 8, 4)
    whole = outputs("maskbit_tokenizer")["random_indices"]
    groups = torch.stack([whole % 8, whole // 8], -1)
    assert torch.equal(halves.decode(groups), codec.decode(whole))
    assert torch.equal(halves.ids(halves.codes(groups)), groups)
    truth = load_file(GOLDEN / "maskbit_lfqbert" / "golden.safetensors")
    full = truth["full_tokens"].view(-1, 4, 4)
    assert torch.equal(halves.ids(codec.codes(full)).flatten(1, 2), truth["split_tokens"])
    save_codec(halves, tmp_path)
    assert load_codec(tmp_path).codes_per_position == 2
    with pytest.raises(CheckpointError, match="divisor of 6"):
        codec.in_groups(4)


def test_a_legacy_decoder_stores_its_levels_the_other_way_round() -> None:
    config = json.loads((GOLDEN / "maskbit_tokenizer" / "config.json").read_text())
    older = maskbit(config=config | {"legacy": True})
    turned = {
        name.replace("decoder.up.0.", "decoder.up.x.")
        .replace("decoder.up.2.", "decoder.up.0.")
        .replace("decoder.up.x.", "decoder.up.2."): tensor
        for name, tensor in weights("maskbit_tokenizer").items()
    }
    older.load_state(turned)
    newer = make_codec({"name": "maskbit", "config": config})
    newer.load_state(weights("maskbit_tokenizer"))
    ids = outputs("maskbit_tokenizer")["random_indices"]
    assert torch.equal(older.decode(ids), newer.decode(ids))
