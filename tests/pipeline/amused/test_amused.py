"""aMUSEd is the official pipeline: logits, codes, words and steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from amused_goldens import FOLDER, GOLDEN, HERE, MASK, PROMPTS, PUBLISHED_MASK, WEIGHTS, conditions
from safetensors.torch import load_file, save_file
from torch import Tensor

import mdiff
from mdiff.backbones.layers.uvit import waves
from mdiff.denoiser import MICRO, POOLED, STATES, guided
from mdiff.errors import DataError
from mdiff.files import read_model_files
from mdiff.modalities.image.codecs.vq_diffusers import vq_diffusers
from mdiff.pipeline.pipeline import Pipeline
from mdiff.pipeline.published import built, load_published
from mdiff.samplers.amused import amused
from mdiff.tokens import TokenSpace

TRACE = json.loads((HERE / "grids.json").read_text())["amused_step_trace"]["cases"][0]


TOLERANCE = 1e-4


def by_position(logits: Tensor) -> Tensor:
    """Logits (B, K, h, w) as (B, L, K)."""
    return logits.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("mask", [PUBLISHED_MASK, MASK])
def test_the_denoiser_s_logits_are_the_official_ones(pipeline: Pipeline, mask: int) -> None:
    tokens = GOLDEN["uvit.input_ids"].flatten(1)
    tokens = torch.where(tokens == PUBLISHED_MASK, mask, tokens)
    with torch.no_grad():
        logits = pipeline.denoiser(tokens, cond=conditions())
        some = pipeline.denoiser(tokens, at=tokens == mask, cond=conditions())
    assert torch.allclose(logits, by_position(GOLDEN["uvit.logits"]), rtol=0, atol=TOLERANCE)
    assert torch.allclose(logits[tokens == mask], some, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, TOLERANCE), (torch.float64, 1e-12)], ids=str
)
def test_a_row_s_logits_do_not_depend_on_its_batch(dtype: torch.dtype, near: float) -> None:
    """But for rounding, whose order depends on the batch's shape and on the processor.

    These random weights make numbers of 25,000 on the way, so that one rounding of each weight
    to float32 moves the logits by up to 1.6e-5 (found in float64), and a pass rounds many times.
    """
    model = load_published(read_model_files(FOLDER / "transformer"), "uvit", dtype=dtype)
    tokens = GOLDEN["uvit.input_ids"].flatten(1)
    with torch.no_grad():
        both = model(tokens, cond=conditions())
        for row in range(2):
            cond = {name: value[row, None] for name, value in conditions().items()}
            alone = model(tokens[row, None], cond=cond)
            assert torch.allclose(alone[0], both[row], rtol=0, atol=near)


def test_the_codec_s_codes_and_pictures_are_the_official_ones(pipeline: Pipeline) -> None:
    codec = pipeline.modality.codec
    with torch.no_grad():
        latents = codec.latents(GOLDEN["vq.pixels"])
    assert torch.allclose(latents, GOLDEN["vq.latents"], rtol=0, atol=TOLERANCE)
    for ids, made in (("vq.indices", "decoded_from_indices"),
                      ("vq.random_indices", "decoded_random_indices")):  # fmt: skip
        with torch.no_grad():
            pictures = codec.pictures(codec.codes(GOLDEN[ids]))
        assert torch.allclose(pictures, GOLDEN[f"vq.{made}"], rtol=0, atol=TOLERANCE)
        shown = (GOLDEN[f"vq.{made}"].clamp(0, 1) * 255).round()
        assert int((codec.decode(GOLDEN[ids]) - shown).abs().max()) <= 1
    quantized = codec.codes(GOLDEN["vq.indices"])
    assert torch.allclose(quantized, GOLDEN["vq.quantized"], rtol=0, atol=TOLERANCE)


def test_the_nearest_codes_are_the_official_ones(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = pipeline.modality.codec
    rows = iter(GOLDEN["vq.latents"])
    monkeypatch.setattr(type(codec), "latents", lambda self, images: next(rows)[None])
    ids = codec.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert torch.equal(ids, GOLDEN["vq.indices"])


def test_pictures_of_whole_pixels_have_the_codes_of_their_latents(pipeline: Pipeline) -> None:
    """The official pixels rounded to 1/255: nearly all codes are theirs."""
    codec = pipeline.modality.codec
    images = (GOLDEN["vq.pixels"] * 255).round().to(torch.uint8)
    ids = codec.encode(images)
    assert float((ids == GOLDEN["vq.indices"]).double().mean()) > 0.9
    assert torch.equal(codec.encode(images[1:]), ids[1:])
    assert codec.encode(images[:0]).shape == (0, 8, 8)
    assert codec.decode(ids[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("only_vocabulary", [False, True])
def test_words_are_encoded_as_officially(copy: Path, only_vocabulary: bool) -> None:
    if only_vocabulary:
        # As in the published directory.
        (copy / "tokenizer" / "tokenizer.json").unlink()
    encoder = mdiff.load(copy).modality.encoder
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.ids(prompt)[0], GOLDEN["text.input_ids"][row])
        found = encoder.encode(prompt)
        states, pooled = GOLDEN["text.penultimate_hidden_state"], GOLDEN["text.text_embeds"]
        assert torch.allclose(found[STATES][0], states[row], rtol=0, atol=TOLERANCE)
        assert torch.allclose(found[POOLED][0], pooled[row], rtol=0, atol=TOLERANCE)
    assert encoder.ids("cat " * 99).shape == (1, 16)


def test_guided_logits_are_those_of_the_official_pipeline(pipeline: Pipeline) -> None:
    denoiser = guided(
        pipeline.denoiser, guidance_scale=4.0, without=pipeline.modality.null_condition
    )
    cond = pipeline.modality.encode_condition(PROMPTS[0])
    for canvas, expected in zip(GOLDEN["pipe.sample_in"], GOLDEN["pipe.guided_logits"]):
        tokens = canvas.flatten(1)
        tokens = torch.where(tokens == PUBLISHED_MASK, MASK, tokens)
        with torch.no_grad():
            logits = denoiser(tokens, cond=cond)
        assert torch.allclose(logits, by_position(expected), rtol=0, atol=TOLERANCE)


class Script:
    """A denoiser that gives, call by call, the logits (B, K, h, w) it was handed."""

    uses_time = False

    def __init__(self, steps: list[Tensor]) -> None:
        self.steps = iter(steps)

    def __call__(self, tokens: Tensor, *, at: Tensor, **_: Any) -> Tensor:
        return by_position(next(self.steps))[at]


def test_the_sampler_takes_the_official_steps() -> None:
    """No token temperature and no noise, as the golden was made: each step's canvas."""
    steps = TRACE["trace"]
    logits = [torch.tensor(step["logits"]) for step in steps]
    space = TokenSpace(logits[0].shape[1], mask_id=logits[0].shape[1])

    def canvas(written: Any) -> Tensor:
        tokens = torch.tensor(written).flatten(1)
        return torch.where(tokens == TRACE["mask_token_id"], space.mask_id, tokens)

    states = amused(
        Script(logits), canvas(steps[0]["sample"]), space=space, temperature=0.0,
        steps=TRACE["steps"], noise=(0.0, 0.0),
    )  # fmt: skip
    for step, state in zip(steps, states, strict=True):
        assert torch.equal(state.tokens, canvas(step["prev_sample"]))


def test_frequencies_are_those_of_the_time_embedding() -> None:
    numbers = torch.tensor([0.0, 2.0])
    angles = 2 * 10000 ** -(torch.arange(2) / 2)
    expected = torch.cat([angles.cos(), angles.sin()])
    assert torch.allclose(waves(numbers, 4)[1], expected)
    assert waves(numbers, 4)[0].tolist() == [1, 1, 0, 0]


def random_folder(path: Path, described: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(described))
    torch.manual_seed(0)
    made = {name: 0.3 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
    save_file(made, path / WEIGHTS)
    return path


@pytest.mark.parametrize("entries", [
    {}, {"use_bias": True, "ln_elementwise_affine": False, "hidden_size": 24,
         "num_attention_heads": 3, "layer_norm_eps": 1e-3},
], ids=["512", "bias"])  # fmt: skip
def test_the_layout_that_halves_its_grid_is_the_official_one(
    entries: dict[str, Any], tmp_path: Path
) -> None:
    official = diffusers.UVit2DModel
    described = json.loads((FOLDER / "transformer" / "config.json").read_text())
    described |= {"downsample": True, "upsample": True, **entries}
    folder = random_folder(tmp_path / "uvit", described, built("uvit", described).state_dict())
    cond = {STATES: torch.randn(2, 7, 12), POOLED: torch.randn(2, 10), MICRO: torch.rand(2, 5) * 99}
    tokens = torch.randint(0, MASK, (2, 36))
    with torch.no_grad():
        ours = load_published(read_model_files(folder), "uvit")(tokens, cond=cond)
        model = official.from_pretrained(folder).eval()
        theirs = by_position(model(tokens.view(2, 6, 6), **cond))
    assert torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_the_codec_with_attention_is_the_official_one(tmp_path: Path) -> None:
    official = diffusers.VQModel
    described = json.loads((FOLDER / "vqvae" / "config.json").read_text()) | {
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "mid_block_add_attention": True, "vq_embed_dim": 5, "layers_per_block": 2,
    }  # fmt: skip
    codec = vq_diffusers(described=described)
    folder = random_folder(tmp_path / "vq", described, codec.state())
    codec.load_state(load_file(folder / WEIGHTS))
    model = official.from_pretrained(folder).eval()
    images = torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8)
    ids = codec.encode(images)
    with torch.no_grad():
        latents = model.encode(images / 255).latents
        assert torch.equal(model.quantize(latents)[2][2].view(ids.shape), ids)
        made = model.decode(ids, force_not_quantize=True, shape=(*ids.shape, 5)).sample
    assert torch.allclose(codec.pictures(codec.codes(ids)), made, rtol=0, atol=TOLERANCE)


def test_the_layout_that_halves_its_grid_takes_even_sides_only(tmp_path: Path) -> None:
    described = json.loads((FOLDER / "transformer" / "config.json").read_text())
    described |= {"downsample": True, "upsample": True}
    folder = random_folder(tmp_path / "uvit", described, built("uvit", described).state_dict())
    model = load_published(read_model_files(folder), "uvit")
    with torch.no_grad():
        assert model(torch.zeros(2, 16, dtype=torch.int64), cond=conditions()).shape == (2, 16, 32)
        with pytest.raises(DataError, match="even side"):
            model(torch.zeros(2, 9, dtype=torch.int64), cond=conditions())
