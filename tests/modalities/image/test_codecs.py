"""What every codec keeps to."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hashed import GOLDEN, golden_weights
from toy_pictures import toy_pictures

from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.untrusted import read_tensors
from mdiff.find import names
from mdiff.modalities.image.codec import (
    SETTINGS,
    TENSORS,
    load_codec,
    make_codec,
    save_codec,
)
from mdiff.modalities.image.fidelity import fidelity
from mdiff.modalities.image.inpainting import touched

TRAINED = {"steps": 6, "batch_size": 8, "width": 8}


# What to make of each part; a part that is not named here is made with its defaults.
# Published codecs come fitted: their own tests hold them to the official code.
KINDS: dict[str, list[dict[str, Any]]] = {
    "vq_diffusers": [],
    "levels": [{}, {"channels": 3}, {"levels": 64, "step": 4}],
    "kmeans": [{"codebook_size": 48}, {"channels": 1, "stride": 2, "codebook_size": 16}],
    "vq": [
        {"codebook_size": 32, **TRAINED},
        {"codebook_size": 16, "codes_per_position": 2, "local": True, "channels": 1, **TRAINED},
    ],
    "bits": [
        {"bits": 6, **TRAINED},
        {"bits": 6, "codes_per_position": 2, "local": True, **TRAINED},
        {
            "quantizer": "fsq",
            "levels": [4, 3, 5],
            "codes_per_position": 2,
            "channels": 1,
            **TRAINED,
        },
    ],
}


GOLDENS = {"taming": "vqgan_taming", "llamagen": "vq_llamagen", "maskbit": "maskbit_tokenizer"}


# Trained elsewhere: made of their config, with weights of the rule of the goldens.
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"config": json.loads((GOLDEN / golden / "config.json").read_text())}
    for name, golden in GOLDENS.items()
}
KINDS |= {name: [options] for name, options in PUBLISHED.items()}
KINDS["maskbit"].append(PUBLISHED["maskbit"] | {"codes_per_position": 2})


CASES = [
    pytest.param(json.dumps({"name": name, **options}), id=f"{name}-{number}")
    for name in names("codecs")
    for number, options in enumerate(KINDS.get(name, [{}]))
]


over_every_codec = pytest.mark.parametrize("described", CASES)


over_every_trainable = pytest.mark.parametrize(
    "described", [case for case in CASES if json.loads(case.values[0])["name"] not in PUBLISHED]
)


@cache
def fitted(described: str) -> Any:
    codec = make_codec(json.loads(described))
    if codec.name in GOLDENS:
        codec.load_state(golden_weights(GOLDENS[codec.name]))
        with pytest.raises(ConfigError, match="not trained here"):
            codec.fit(toy_pictures(1, codec.channels))
        return codec
    return codec.fit(toy_pictures(40, codec.channels), seed=3)


def test_files_call_codes_per_position_splits() -> None:
    codec = make_codec({"name": "vq", "splits": 2, "width": 8})
    assert codec.codes_per_position == 2
    assert codec.config()["splits"] == 2
    with pytest.raises(ConfigError, match="splits"):
        make_codec({"name": "vq", "splits": 2, "codes_per_position": 2})


@over_every_codec
def test_ids_have_the_stated_shape_and_range_and_decode_to_pictures(described: str) -> None:
    codec = fitted(described)
    images = toy_pictures(5, codec.channels, (16, 24))
    ids = codec.encode(images)
    grid = (5, 16 // codec.stride, 24 // codec.stride)
    codes = codec.codes_per_position
    assert tuple(ids.shape) == (grid if codes == 1 else (*grid, codes))
    assert ids.dtype == torch.int64
    assert 0 <= int(ids.min()) <= int(ids.max()) < codec.codebook_size
    assert ids.unique().numel() > 1
    back = codec.decode(ids)
    assert back.shape == images.shape
    assert back.dtype == torch.uint8
    assert codec.encode(images[:0]).shape == ids[:0].shape
    assert codec.decode(ids[:0]).shape == images[:0].shape


@over_every_codec
def test_a_picture_s_ids_do_not_depend_on_its_batch(described: str) -> None:
    codec = fitted(described)
    images = toy_pictures(9, codec.channels)
    ids = codec.encode(images)
    back = codec.decode(ids)
    assert torch.equal(codec.encode(images.flip(0)).flip(0), ids)
    for number in range(9):
        assert torch.equal(codec.encode(images[number, None])[0], ids[number])
        alone = codec.decode(ids[number, None])[0]
        # A decoder's last float may round otherwise: one step of a pixel.
        assert int((alone.int() - back[number].int()).abs().max()) <= 1


@over_every_codec
def test_a_saved_codec_comes_back_bit_for_bit(described: str, tmp_path: Path) -> None:
    codec = fitted(described)
    save_codec(codec, tmp_path)
    again = load_codec(tmp_path)
    assert again.config() == codec.config()
    state = codec.state()
    assert state.keys() == again.state().keys()
    for name, tensor in again.state().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name])
    for name in (
        "channels", "stride", "codes_per_position", "codebook_size", "receptive_field_margin",
        "lossless",
    ):  # fmt: skip
        assert getattr(again, name) == getattr(codec, name)
    images = toy_pictures(6, codec.channels)
    ids = codec.encode(images)
    assert torch.equal(again.encode(images), ids)
    assert torch.equal(again.decode(ids), codec.decode(ids))


@over_every_trainable
def test_the_same_seed_gives_the_same_codec_and_leaves_torch_s_generator(described: str) -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    codec = make_codec(json.loads(described))
    # Initial weights may be drawn; fitting must not draw from the global generator.
    torch.random.set_rng_state(before)
    codec.fit(toy_pictures(40, codec.channels), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    state = fitted(described).state()
    for name, tensor in codec.state().items():
        assert torch.equal(tensor, state[name]), name


@over_every_codec
def test_pixels_beyond_the_reach_never_change_a_token(described: str) -> None:
    codec = fitted(described)
    if codec.receptive_field_margin is None:
        one_pixel = torch.zeros(4 * codec.stride, 4 * codec.stride, dtype=torch.bool)
        one_pixel[0, 0] = True
        # Every token reads it; those of the others' own patches are given all the same.
        assert touched(codec, one_pixel).nonzero().tolist() == [[0, 0]]
        return
    stride, margin = codec.stride, codec.receptive_field_margin
    # One position with all that it may read around it, and a frame of two positions more.
    beside = -(-margin // stride) + 2
    side = (2 * beside + 1) * stride
    images = toy_pictures(12, codec.channels, (side, side))
    here = slice(beside * stride - margin, (beside + 1) * stride + margin)
    outside = images.roll(1, 0)
    outside[:, :, here, here] = images[:, :, here, here]
    inside = images.clone()
    inside[:, :, here, here] = images.roll(1, 0)[:, :, here, here]
    ids = codec.encode(images)[:, beside, beside]
    assert not torch.equal(outside, images)
    assert torch.equal(codec.encode(outside)[:, beside, beside], ids)
    assert not torch.equal(codec.encode(inside)[:, beside, beside], ids)


@over_every_codec
def test_a_lossless_codec_gives_back_every_bit(described: str) -> None:
    codec = fitted(described)
    images = toy_pictures(12, codec.channels)
    same = torch.equal(codec.decode(codec.encode(images)), images)
    assert same or not codec.lossless


@over_every_codec
def test_the_report_says_what_is_lost_and_how_much_of_the_codebook_is_used(described: str) -> None:
    codec = fitted(described)
    images = toy_pictures(30, codec.channels)
    kept = fidelity(codec, images, batch_size=7)
    ids = codec.encode(images)
    used = ids.unique().numel()
    assert kept.usage == pytest.approx(used / codec.codebook_size)
    assert 1 <= kept.perplexity <= used + 1e-9
    bits_a_code = torch.tensor(float(codec.codebook_size)).log2().item()
    bits_a_position = codec.codes_per_position * bits_a_code
    assert kept.bits_per_pixel == pytest.approx(bits_a_position / codec.stride**2)
    error = (codec.decode(ids).double() - images.double()).square().mean()
    if codec.lossless:
        assert kept.psnr == float("inf")
        assert kept.ssim == pytest.approx(1, abs=1e-4)
    else:
        assert kept.psnr == pytest.approx(float(10 * torch.log10(255**2 / error)), rel=1e-6)


@over_every_codec
def test_pictures_that_do_not_fit_are_refused_in_one_line(described: str) -> None:
    codec = fitted(described)
    images = toy_pictures(2, codec.channels)
    other = toy_pictures(2, 4 - codec.channels)
    wrong: list[Any] = [images[0], images.float(), other, images[..., :0], images.numpy()]
    if codec.stride > 1:
        wrong.append(images[..., :15])
    for bad in wrong:
        for use in (codec.encode, codec.fit):
            with pytest.raises(DataError) as caught:
                use(bad)
            assert "\n" not in str(caught.value)


@over_every_codec
def test_ids_that_do_not_fit_are_refused(described: str) -> None:
    codec = fitted(described)
    ids = codec.encode(toy_pictures(2, codec.channels))
    for bad in (ids.int(), ids[0], ids[..., None], ids * 0 - 1, ids * 0 + codec.codebook_size):
        with pytest.raises(DataError):
            codec.decode(bad)
    with pytest.raises(DataError, match=f"ids 0 to {codec.codebook_size - 1}"):
        codec.decode(ids * 0 + codec.codebook_size)


@over_every_codec
def test_damaged_files_are_refused_and_named(described: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    codec = fitted(described)
    save_codec(codec, tmp_path)
    path = tmp_path / TENSORS
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        load_codec(tmp_path)
    path.write_bytes(whole)
    tensors = read_tensors(path)
    name = sorted(tensors)[0]
    short = {key: value for key, value in tensors.items() if key != name}
    save_file(short, path)
    with pytest.raises(CheckpointError, match=name):
        load_codec(tmp_path)
    save_file(short | {name: torch.cat([tensors[name], tensors[name]])}, path)
    with pytest.raises(CheckpointError, match=name.split(".")[-1]):
        load_codec(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        load_codec(tmp_path)
    path.write_bytes(whole)
    settings_of = json.loads((tmp_path / SETTINGS).read_text())
    for wrong in ({"name": "nothing"}, {"name": "os:system"}, {}, settings_of | {"odd": 1}):
        (tmp_path / SETTINGS).write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError):
            load_codec(tmp_path)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"name": "kmean"}, "did you mean 'kmeans'"),
        ({"name": "kmeans", "size": 4}, "size"),
        ({"name": "kmeans", "codebook_size": 0}, "codec.codebook_size=0"),
        ({"name": "levels", "levels": 18, "step": 15}, "expected 1 to 18"),
        ({"name": "levels", "levels": 257}, "expected 1 to 256"),
        ({"name": "levels", "channels": True}, "codec.channels=True"),
        ({"name": "levels", "step": 0}, "codec.step=0"),
        ({"name": "bits", "quantizer": "lfqq"}, "did you mean 'lfq'"),
        ({"name": "bits", "bits": 7, "codes_per_position": 2}, "multiple of codes_per_position"),
        ({"name": "bits", "bits": 34, "codes_per_position": 2}, "at most 16 bits"),
        ({"name": "bits", "levels": [5, 5]}, "for quantizer: fsq"),
        ({"name": "bits", "quantizer": "fsq", "bits": 8}, "for quantizer: lfq"),
        ({"name": "bits", "quantizer": "fsq", "levels": [8, 2]}, "at least 3"),
        ({"name": "bits", "quantizer": "fsq", "levels": []}, "at least 3"),
        ({"name": "bits", "quantizer": "fsq", "levels": [99, 99, 99]}, "at most 65536"),
        ({"name": "bits", "entropy": -1}, "codec.entropy=-1"),
        ({"name": "bits", "stride": 3}, "power of two"),
        ({"name": "bits", "stepz": 3}, "did you mean 'steps'"),
        ({"name": "vq", "stride": 6}, "power of two"),
        ({"name": "vq", "width": 0}, "codec.width=0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(described: dict[str, Any], said: str) -> None:
    if described.get("levels") == 18:
        described = described | {"levels": 19}
    with pytest.raises(ConfigError) as caught:
        make_codec(described)
    assert said in str(caught.value)


def test_a_path_without_a_codec_is_named_as_such(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", "a/b"):
        with pytest.raises(CheckpointError, match="there is no codec"):
            make_codec(str(path))
    made = make_codec({"name": "levels", "levels": 4, "step": 60})
    save_codec(made, tmp_path / "new" / "codec")
    assert load_codec(tmp_path / "new" / "codec").codebook_size == 4
