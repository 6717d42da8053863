"""aMUSEd's directory: each part against the official code, the whole loaded, run and saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from folders import GOLDEN as GOLDEN_FOLDER
from PIL import Image as Pillow
from safetensors.torch import load_file, save_file
from torch import Tensor

import mdiff
from mdiff.backbones.layers.uvit import waves
from mdiff.cli import run
from mdiff.denoiser import MICRO, POOLED, STATES, guided
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import read_model_files
from mdiff.modalities.image.codec import load_codec, save_codec
from mdiff.modalities.image.codecs.vq_diffusers import vq_diffusers
from mdiff.modalities.image.data.images import Pictures
from mdiff.pipeline.pipeline import Pipeline
from mdiff.pipeline.published import built, load_published
from mdiff.samplers.amused import amused
from mdiff.tokens import TokenSpace

HERE = GOLDEN_FOLDER
FOLDER = HERE / "amused"
GOLDEN = load_file(FOLDER / "golden.safetensors")
TRACE = json.loads((HERE / "grids.json").read_text())["amused_step_trace"]["cases"][0]
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-4
PROMPTS = ("a red cat", "dog 3, no cat!", "")
# The published mask is the last row of the embedding; on our canvas it follows the 32 codes.
PUBLISHED_MASK, MASK = 39, 32


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return mdiff.load(FOLDER)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "amused")


def conditions() -> dict[str, Tensor]:
    return {name: GOLDEN[f"uvit.{name}"] for name in (STATES, POOLED, MICRO)}


def by_position(logits: Tensor) -> Tensor:
    """Logits (B, K, h, w) as (B, L, K)."""
    return logits.flatten(2).transpose(1, 2)


def edited(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# Each part against the official code


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


# The whole


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


# Larger layouts


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


# Bad input


@pytest.mark.parametrize("part", ["transformer", "vqvae", "text_encoder"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "truncated"])
def test_tensors_that_do_not_fit_are_refused(copy: Path, part: str, change: str) -> None:
    name = "model.safetensors" if part == "text_encoder" else WEIGHTS
    path = copy / part / name
    tensors = load_file(path)
    first = sorted(tensors)[0]
    if change == "missing":
        del tensors[first]
    elif change == "unexpected":
        tensors["another"] = torch.zeros(2)
    elif change == "shape":
        tensors[first] = torch.zeros(3, 3)
    save_file(tensors, path, {"format": "pt"})
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError):
        mdiff.load(copy)


@pytest.mark.parametrize(("part", "entries"), [
    ("transformer", {"hidden_size": 1 << 40}), ("transformer", {"num_hidden_layers": 0}),
    ("transformer", {"downsample": True}), ("transformer", {"num_attention_heads": 3}),
    ("transformer", {"vocab_size": 32}), ("transformer", {"micro_cond_embed_dim": 21}),
    ("transformer", {"codebook_size": 16}), ("transformer", {"_class_name": "UNet2DModel"}),
    ("vqvae", {"norm_type": "spatial"}), ("vqvae", {"act_fn": "gelu"}),
    ("vqvae", {"block_out_channels": [8, "12"]}), ("vqvae", {"block_out_channels": []}),
    ("vqvae", {"up_block_types": ["UpDecoderBlock2D"]}), ("vqvae", {"norm_num_groups": 5}),
    ("vqvae", {"down_block_types": ["DownEncoderBlock2D", "Other"]}),
    ("vqvae", {"out_channels": 4}), ("vqvae", {"_class_name": "AutoencoderKL"}),
    ("text_encoder", {"architectures": ["T5EncoderModel"]}),
    ("text_encoder", {"vocab_size": 1 << 40}), ("text_encoder", {"max_position_embeddings": 8}),
], ids=str)  # fmt: skip
def test_configs_that_cannot_be_meant_are_refused(
    copy: Path, part: str, entries: dict[str, Any]
) -> None:
    edited(copy / part / "config.json", **entries)
    with pytest.raises(CheckpointError):
        mdiff.load(copy)


def test_directories_that_are_not_of_this_kind_are_refused(copy: Path) -> None:
    index, scheduler = copy / "model_index.json", copy / "scheduler" / "scheduler_config.json"
    plain = index.read_text()
    for entries, said in (
        ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline, which is not"),
        ({"transformer": ["diffusers", "UNet2DModel"]}, "transformer"),
        ({"transformer": "../elsewhere"}, "transformer"),
        ({"../x": ["diffusers", "UVit2DModel"]}, "plain name"),
        ({"vqvae": ["diffusers"]}, "vqvae"),
    ):
        edited(index, **entries)
        with pytest.raises(CheckpointError, match=said):
            mdiff.load(copy)
        index.write_text(plain)
    edited(scheduler, masking_schedule="linear")
    with pytest.raises(CheckpointError, match="masking_schedule"):
        mdiff.load(copy)
    edited(scheduler, masking_schedule="cosine", mask_token_id=31)
    with pytest.raises(CheckpointError, match="mask_token_id"):
        mdiff.load(copy)
    shutil.rmtree(copy / "vqvae")
    edited(scheduler, mask_token_id=PUBLISHED_MASK)
    with pytest.raises(CheckpointError, match="vqvae"):
        mdiff.load(copy)


def test_conditions_and_canvases_that_do_not_fit_are_refused(pipeline: Pipeline) -> None:
    tokens = torch.full((2, 64), MASK)
    model = pipeline.denoiser
    for name, value in ((STATES, torch.zeros(2, 7, 5)), (POOLED, torch.zeros(1, 10)),
                        (MICRO, torch.zeros(2, 4))):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            model(tokens, cond={**conditions(), name: value})
    with pytest.raises(ConfigError, match=STATES):
        model(tokens)
    with pytest.raises(DataError, match="a square"):
        model(tokens[:, :63], cond=conditions())
    with pytest.raises(ConfigError, match="padding"):
        model(tokens, cond=conditions(), valid=torch.ones_like(tokens, dtype=torch.bool))
    with pytest.raises(ConfigError, match="guidance_scale"):
        pipeline.generate("dog", negative="cat")
    with pytest.raises(DataError, match="label"):
        pipeline.generate([{"label": "dog"}])
    for options in ({"steps": 0}, {"noise": (1.0,)}):
        with pytest.raises(ConfigError):
            pipeline.generate("dog", **options)
