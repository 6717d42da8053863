"""Files, configs and conditions of aMUSEd that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from amused_goldens import MASK, PUBLISHED_MASK, WEIGHTS, conditions
from safetensors.torch import load_file, save_file

import mdiff
from mdiff.denoiser import MICRO, POOLED, STATES
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.pipeline.pipeline import Pipeline


def edited(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


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
