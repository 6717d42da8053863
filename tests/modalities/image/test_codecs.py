"""Codecs: one suite over every file of the room, then what each promises beyond it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hashed import GOLDEN, golden_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdiff.backbones.layers.bits import bits_of, ids_of, other_bit_order
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
from mdiff.modalities.image.codecs.bits import Quantizer, bits
from mdiff.modalities.image.codecs.kmeans import (
    EXACT_IN_FLOAT32,
    kmeans,
    nearest_centre,
    patches,
    settle,
)
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.codecs.networks.autoencoder import Encoder, levels_of
from mdiff.modalities.image.codecs.networks.fit import Training
from mdiff.modalities.image.codecs.vq import vq
from mdiff.modalities.image.data.images import read_pictures
from mdiff.modalities.image.data.readers import DIGITS
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


def toy_pictures(count: int, channels: int, size: tuple[int, int] = (16, 16)) -> Tensor:
    """Slanted waves of random slope and phase, in whole multiples of 4."""
    random = torch.Generator().manual_seed(count * 7 + channels)
    slope = torch.rand(2, count, channels, 1, 1, generator=random) * 1.2 - 0.6
    phase = torch.rand(count, channels, 1, 1, generator=random) * 6.28
    down, right = torch.arange(size[0])[:, None], torch.arange(size[1])
    waves = torch.sin(slope[0] * down + slope[1] * right + phase)
    return ((waves + 1) * 31.5).round().to(torch.uint8) * 4


@cache
def fitted(described: str) -> Any:
    codec = make_codec(json.loads(described))
    if codec.name in GOLDENS:
        codec.load_state(golden_weights(GOLDENS[codec.name]))
        with pytest.raises(ConfigError, match="not trained here"):
            codec.fit(toy_pictures(1, codec.channels))
        return codec
    return codec.fit(toy_pictures(40, codec.channels), seed=3)


# Every codec


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


# levels


@pytest.mark.parametrize("options", [{}, {"levels": 17, "step": 15}])
def test_the_seventeen_greys_of_digits_are_seventeen_ids(options: dict[str, int]) -> None:
    images = read_pictures(DIGITS, channels=1).pixels
    codec = levels(**options).fit(images)
    assert codec.codebook_size == 17
    ids = codec.encode(images)
    assert torch.equal(ids, (images[:, 0] // 15).long())
    assert torch.equal(codec.decode(ids), images)


def test_an_unknown_pixel_value_is_refused_with_the_nearest() -> None:
    images = torch.tensor([0, 15, 100, 240], dtype=torch.uint8).view(1, 1, 2, 2)
    with pytest.raises(DataError, match=r"pixel value 100: .*17 values.*the nearest is 105"):
        levels(levels=17, step=15).encode(images)
    with pytest.raises(DataError, match="the nearest is 105"):
        levels(levels=17, step=15).fit(images)


def test_without_fitting_all_256_values_are_ids_in_channels_side_by_side() -> None:
    images = torch.arange(256 * 3).view(1, 3, 16, 16).remainder(256).to(torch.uint8)
    codec = levels(channels=3)
    assert torch.equal(codec.encode(images)[0], images[0].permute(1, 2, 0).long())
    assert torch.equal(codec.decode(codec.encode(images)), images)


# kmeans


@given(
    dims=st.sampled_from([1, 12, 48, EXACT_IN_FLOAT32, EXACT_IN_FLOAT32 + 1, 768]),
    seed=st.integers(0, 2**20),
    extreme=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_distances_are_exact_whole_numbers(dims: int, seed: int, extreme: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    draw: Callable[..., Tensor] = lambda n: torch.randint(  # noqa: E731
        0, 256, (n, dims), generator=random, dtype=torch.uint8
    )
    points, centres = draw(30), draw(7)
    if extreme:
        points, centres = (points > 127).byte() * 255, (centres > 127).byte() * 255
    ids, far = nearest_centre(points, centres)
    true = (points.long()[:, None] - centres.long()[None]).square().sum(2)
    assert torch.equal(far.long(), true.min(1).values)
    assert torch.equal(ids, true.argmin(1))


def test_kmeans_of_as_many_patches_as_centres_loses_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    book = torch.randint(0, 256, (20, 3, 4, 4), generator=random, dtype=torch.uint8)
    chosen = torch.randint(0, 20, (50, 4, 4), generator=random)
    chosen[0].view(-1)[:] = torch.arange(16)
    chosen[1].view(-1)[:4] = torch.arange(16, 20)
    codec = kmeans(codebook_size=20)
    codec.codebook = book
    images = codec.decode(chosen)
    assert torch.equal(patches(images, 4)[7, 2, 3], book[chosen[7, 2, 3]].flatten())
    learnt = kmeans(codebook_size=20).fit(images)
    assert torch.equal(learnt.decode(learnt.encode(images)), images)
    with pytest.raises(DataError, match="20 different patches: codebook_size=21"):
        kmeans(codebook_size=21).fit(images)


def test_kmeans_is_a_function_of_its_seed_and_wastes_no_centre() -> None:
    images = toy_pictures(60, 3)
    first, again, other = (kmeans(codebook_size=64).fit(images, seed=s) for s in (5, 5, 6))
    assert first.codebook is not None
    assert other.codebook is not None
    assert torch.equal(first.codebook, again.codebook)
    assert not torch.equal(first.codebook, other.codebook)
    assert first.encode(images).unique().numel() == 64


def test_kmeans_is_better_than_patches_drawn_at_random() -> None:
    images = toy_pictures(200, 1)
    held_out = toy_pictures(50, 1)
    learnt = kmeans(channels=1, codebook_size=64).fit(images)
    random = kmeans(channels=1, codebook_size=64)
    number = torch.randperm(200 * 16, generator=torch.Generator().manual_seed(0))[:64]
    random.codebook = patches(images, 4).flatten(0, 2)[number].view(64, 1, 4, 4)

    def error(codec: Any) -> float:
        return float((codec.decode(codec.encode(held_out)).float() - held_out).square().mean())

    assert error(learnt) < 0.8 * error(random)


def test_dead_centres_are_set_again_and_the_others_become_the_means_of_their_points() -> None:
    points = torch.tensor([[0], [2], [100], [200]], dtype=torch.uint8)
    times = torch.tensor([1, 3, 1, 1])
    centres = torch.tensor([[0], [255], [255]], dtype=torch.uint8)
    alive, revived = settle(centres, points, times)
    # 0 once and 2 three times have the mean 1.5, which rounds to the even 2.
    assert sorted(alive[:, 0].tolist()) == [2, 100, 200]
    assert revived == 1


def test_an_unfitted_kmeans_says_so() -> None:
    with pytest.raises(ConfigError, match="no centres yet"):
        kmeans().encode(toy_pictures(1, 3))


# bits


@given(st.integers(1, 16), st.integers(0, 2**16 - 1))
@settings(max_examples=60, deadline=None)
def test_bits_and_ids_are_each_other_s_inverse_highest_bit_first(count: int, number: int) -> None:
    number %= 2**count
    ids = torch.tensor([[number]])
    spelled = bits_of(ids, count)
    assert "".join(map(str, spelled[0, 0].tolist())) == f"{number:0{count}b}"
    assert torch.equal(ids_of(spelled), ids)
    assert int(other_bit_order(ids, count)) == int(f"{number:0{count}b}"[::-1], 2)
    assert torch.equal(other_bit_order(other_bit_order(ids, count), count), ids)


@pytest.mark.parametrize("count", [1, 3])
def test_the_bit_matrix_is_what_the_decoder_is_given(count: int) -> None:
    codec = bits(bits=6, codes_per_position=count, channels=1, width=8)
    matrix = codec.bit_matrix()
    each = 6 // count
    assert matrix.shape == (2**each, each)
    assert torch.equal(matrix, bits_of(torch.arange(2**each), each) * 2.0 - 1)
    features = torch.randn(2, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    codes, ids, _ = codec.quantizer(features)
    assert torch.equal(codes, torch.where(features > 0, 1.0, -1.0))
    spread = ids if count > 1 else ids[..., None]
    assert torch.equal(matrix[spread].flatten(3).permute(0, 3, 1, 2), codes)
    assert torch.equal(codec.quantizer.inner.indices_to_codes(ids), codes)


def test_fsq_has_the_product_of_its_levels_and_every_id_a_code_of_its_own() -> None:
    codec = bits(quantizer="fsq", levels=[8, 5, 3], channels=1, width=8)
    assert codec.codebook_size == 8 * 5 * 3
    matrix = codec.bit_matrix()
    assert matrix.shape == (120, 3)
    assert matrix.unique(dim=0).shape == matrix.shape
    assert [matrix[:, i].unique().numel() for i in range(3)] == [8, 5, 3]
    assert float(matrix.abs().max()) == 1
    # The first level varies fastest.
    assert matrix[:8, 0].unique().numel() == 8
    assert matrix[:8, 1:].unique(dim=0).shape[0] == 1
    ids = torch.arange(120).view(2, 6, 10)
    assert torch.equal(codec.quantizer.inner.codes_to_indices(matrix[ids]).long(), ids)
    assert torch.equal(codec.quantizer.inner.indices_to_codes(ids), matrix[ids].movedim(3, 1))


def entropy_loss(features: Tensor, *, weight: float, autocast: bool = False) -> float:
    codec = bits(bits=features.shape[1], entropy=weight, commitment=0.0, channels=1, width=8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return float(codec.quantizer.train()(features)[2])


def test_the_entropy_loss_is_minus_log_k_for_sure_codes_that_are_all_used() -> None:
    every = bits_of(torch.arange(16), 4) * 2.0 - 1
    spread = every.T.reshape(1, 4, 4, 4)
    same = every[5].expand(16, 4).T.reshape(1, 4, 4, 4)
    least = -float(torch.tensor(16.0).log())
    assert entropy_loss(spread, weight=0.5) == pytest.approx(0.5 * least, abs=1e-3)
    assert entropy_loss(same, weight=0.5) == pytest.approx(0, abs=1e-3)
    # Codes that are unsure cost their own entropy, which is then that of all.
    assert entropy_loss(spread * 0, weight=1) == pytest.approx(0, abs=1e-3)


def test_the_entropy_loss_is_the_same_under_autocast() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 8, 8, generator=random) * 0.01
    plain = entropy_loss(features, weight=1)
    assert entropy_loss(features, weight=1, autocast=True) == plain


@pytest.mark.parametrize("options", [{"bits": 4}, {"quantizer": "fsq", "levels": [5, 5]}])
def test_gradients_reach_the_encoder_through_the_quantiser(options: dict[str, Any]) -> None:
    quantizer: Quantizer = bits(channels=1, width=8, **options).quantizer.train()
    inside = 4 if "bits" in options else 2
    features = torch.full((1, inside, 2, 2), 0.3, requires_grad=True)
    quantizer(features)[0].sum().backward()
    assert features.grad is not None
    assert float(features.grad.min()) > 0


def test_fitting_bits_lowers_the_error_below_that_of_the_mean() -> None:
    images = toy_pictures(64, 1)
    said: list[str] = []
    codec = bits(channels=1, stride=4, bits=8, width=8, steps=40, batch_size=16)
    codec.fit(images, seed=0, report=said.append)
    error = (codec.decode(codec.encode(images)).float() - images).square().mean()
    assert float(error) < 0.5 * float(images.float().var())
    assert said
    assert "psnr" in said[-1]


# vq and the networks


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("stride", "blocks"), [(1, 1), (2, 2), (4, 1), (8, 2)])
def test_an_encoder_reads_exactly_as_far_as_it_says(stride: int, blocks: int, kernel: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder(
        channels=1, width=4, stride=stride, blocks=blocks, out=3, kernel=kernel
    ).double()
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight)
    beside = -(-encoder.receptive_field_margin // stride) + 1
    side = (2 * beside + 1) * stride
    images = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    encoder(images)[0, :, beside, beside].sum().backward()
    assert images.grad is not None
    read = images.grad[0, 0].abs().sum(1).nonzero()[:, 0]
    assert int(read.min()) == beside * stride - encoder.receptive_field_margin
    assert int(read.max()) == (beside + 1) * stride + encoder.receptive_field_margin - 1


def test_strides_are_powers_of_two() -> None:
    assert [levels_of(stride) for stride in (1, 2, 4, 16)] == [0, 1, 2, 4]
    with pytest.raises(ConfigError):
        levels_of(0)


def test_commitment_pulls_the_features_and_never_the_codebook() -> None:
    losses = []
    for weight in (0.25, 0.5):
        codec = vq(channels=1, codebook_size=8, code_width=4, width=8, commitment=weight)
        torch.manual_seed(0)
        quantizer = codec.new_quantizer().train()
        features = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1))
        features.requires_grad_(True)
        quantizer(features)
        torch.manual_seed(2)
        _, _, loss = quantizer(features)
        loss.sum().backward()
        losses.append(float(loss.detach().sum()))
        assert features.grad is not None
        assert float(features.grad.abs().sum()) > 0
        assert all(weight.grad is None for weight in quantizer.parameters())
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 20, 40])
def test_a_codec_may_be_trained_for_any_number_of_steps(steps: int) -> None:
    plan = Training(steps=steps)
    rates = [plan.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[-1] <= rates[max(0, steps // 20 - 1)]


def test_a_path_without_a_codec_is_named_as_such(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", "a/b"):
        with pytest.raises(CheckpointError, match="there is no codec"):
            make_codec(str(path))
    made = make_codec({"name": "levels", "levels": 4, "step": 60})
    save_codec(made, tmp_path / "new" / "codec")
    assert load_codec(tmp_path / "new" / "codec").codebook_size == 4
