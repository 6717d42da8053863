"""Codecs of networks: bits, vq, and how they are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_pictures import toy_pictures

from mdiff.backbones.layers.bits import bits_of, ids_of, other_bit_order
from mdiff.errors import ConfigError
from mdiff.modalities.image.codecs.bits import Quantizer, bits
from mdiff.modalities.image.codecs.networks.autoencoder import Encoder, levels_of
from mdiff.modalities.image.codecs.networks.fit import Training
from mdiff.modalities.image.codecs.vq import vq


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
def test_the_codebook_of_bits_is_what_the_decoder_is_given(count: int) -> None:
    codec = bits(bits=6, codes_per_position=count, channels=1, width=8)
    matrix = codec.quantizer.inner.codebook.float()
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
    matrix = codec.quantizer.inner.implicit_codebook
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
