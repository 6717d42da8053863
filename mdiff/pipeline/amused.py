"""The directory of aMUSEd (Patil et al. 2024) in the diffusers layout, and its own sampler.

Project huggingface/diffusers, `AmusedPipeline` and `AmusedScheduler`, 0.42 (2026).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdiff.backbones.layers import Backbone
from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import (
    CONFIG,
    MODEL_INDEX,
    TYPES,
    Fields,
    ModelFiles,
    load_weights,
    read_json,
)
from mdiff.find import find
from mdiff.modalities import Modality
from mdiff.modalities.image import ARCHITECTURE, described, load_text_encoder
from mdiff.pipeline.published import load_published
from mdiff.sampling import State, schedule_counts
from mdiff.schedule import Cosine
from mdiff.tokens import TokenSpace

CLASSES = {
    "transformer": "UVit2DModel", "vqvae": "VQModel", "text_encoder": ARCHITECTURE,
    "tokenizer": "CLIPTokenizer", "scheduler": "AmusedScheduler",
}  # fmt: skip
SCHEDULER = "scheduler_config.json"
# The calls that it makes and the noise of its first and last choice, where nothing is asked for.
STEPS, NOISE = 12, (2.0, 0.0)


@dataclass(frozen=True)
class CosineInFloat32(Cosine):
    """The cosine as its code rounds it: cos(pi / 3) falls just below 1/2, and a count with it."""

    def mask_prob(self, t: Tensor | float) -> Tensor:
        """m(t) = cos(pi (1 - t) / 2), in float32."""
        ratio = 1 - torch.as_tensor(t, dtype=torch.float64)
        return torch.cos(ratio.float() * math.pi / 2)


def amused(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    steps: int = STEPS,
    noise: tuple[float, float] = NOISE,
) -> Iterator[State]:
    """States of the sampler that aMUSEd was published with.

    `confidence` with counts along the cosine of all places of the canvas, given ones too, and
    with Gumbel noise whose factor goes evenly from `noise[0]` at the first of `steps` calls to
    `noise[1]` at the last. The guidance that goes with it is guidance_scale=10.

    Raises ConfigError for steps < 1, and as `confidence` does.
    """
    if steps < 1 or len(noise) != 2:
        raise ConfigError(f"steps={steps}, noise={noise}: expected at least 1 step and two numbers")
    hidden = canvas == space.mask_id
    places = torch.ones_like(hidden) if valid is None else valid
    counts = schedule_counts(
        (hidden & places).sum(1), steps=steps, schedule=CosineInFloat32(), of=places.sum(1)
    )
    states: Iterator[State] = find("samplers", "confidence")(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, counts=counts,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        noise=torch.linspace(*noise, steps),
    )  # fmt: skip
    return states


@dataclass(frozen=True)
class Directory:
    """What a directory holds, loaded."""

    denoiser: Backbone
    space: TokenSpace
    modality: Modality


def load_directory(
    files: ModelFiles, *, dtype: torch.dtype | None, device: torch.device
) -> Directory:
    """The model in a directory with a model_index.json.

    `dtype` is that of the denoiser and the text encoder; the codec is float32. Raises
    CheckpointError for a directory of another kind, and where its parts are not sound or do not
    fit together.
    """
    folder, found = files.folder, files.classes
    for part, kind in CLASSES.items():
        # Both forms of the tokenizer read the same files.
        if found.get(part, "").removesuffix("Fast") != kind:
            raise CheckpointError(f"{folder / MODEL_INDEX}: {part}={found.get(part)!r}: not {kind}")
    for part in ("transformer", "vqvae", "text_encoder"):
        if part not in files.parts:
            raise CheckpointError(f"{folder / part / CONFIG} is missing")
    denoiser = load_published(files.parts["transformer"], "uvit", dtype=dtype, device=device)
    settings = Fields(read_json(folder / "scheduler" / SCHEDULER), SCHEDULER)
    settings.choice("masking_schedule", ("cosine",), default="cosine")
    row = int(denoiser.described["vocab_size"]) - 1
    if settings.whole("mask_token_id", least=0) != row:
        raise CheckpointError(f"{SCHEDULER}: mask_token_id: expected {row}, the transformer's last")
    codec = load_codec(files.parts["vqvae"], device)
    encoder = load_text_encoder(
        files.parts["text_encoder"], folder / "tokenizer", dtype=dtype, device=device
    )
    read, said = encoder.model.config, denoiser.described
    got = codec.codebook_size, read.hidden_size, read.projection_dim
    wanted = denoiser.vocab_size, said["encoder_hidden_size"], said["cond_embed_dim"]
    if got != wanted:
        raise CheckpointError(
            f"{folder}: codes, states and vector of the codec and the text encoder: {got}; the "
            f"transformer is for {wanted}"
        )
    side = int(said["sample_size"]) * codec.stride
    kept = {
        part: {name: (folder / part / name).read_bytes()}
        for part, name in ((".", MODEL_INDEX), ("scheduler", SCHEDULER))
    }
    modality = described(codec=codec, size=(side, side), encoder=encoder, files=kept)
    space = TokenSpace(denoiser.vocab_size, mask_id=denoiser.vocab_size)
    return Directory(denoiser, space, modality)


def load_codec(files: ModelFiles, device: torch.device) -> Any:
    """The VQModel in a folder of the diffusers layout, in float32."""
    with torch.device("meta"):
        codec = find("codecs", "vq_diffusers")(described=files.config)
    load_weights(codec, files.headers, dtype=torch.float32, device=device)
    codec.stored = {name: TYPES[entry["dtype"]] for name, entry in files.entries.items()}
    return codec.requires_grad_(False).eval()
