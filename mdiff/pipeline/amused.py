"""The directory of aMUSEd (Patil et al. 2024) in the layout of diffusers.

Project huggingface/diffusers, `AmusedPipeline` and `AmusedScheduler`, 0.42 (2026).
"""

import torch

from mdiff.errors import CheckpointError
from mdiff.files import CONFIG, MODEL_INDEX, TYPES, Fields, ModelFiles, read_json, without_memory
from mdiff.modalities.image import ARCHITECTURE, load_text_encoder, text_to_image
from mdiff.modalities.image.codecs.vq_diffusers import VQDiffusers, vq_diffusers
from mdiff.pipeline.pipeline import Pipeline
from mdiff.pipeline.published import check_mask_id, load_published
from mdiff.tokens import TokenSpace

CLASSES = {
    "transformer": "UVit2DModel", "vqvae": "VQModel", "text_encoder": ARCHITECTURE,
    "tokenizer": "CLIPTokenizer", "scheduler": "AmusedScheduler",
}  # fmt: skip
SCHEDULER = "scheduler_config.json"


def load_directory(
    files: ModelFiles, *, dtype: torch.dtype | None, device: torch.device, mask_id: int | None
) -> Pipeline:
    """The model in a directory with a model_index.json; it generates by the sampler `amused`.

    `dtype` is that of the denoiser and the text encoder; the codec is float32. Raises
    CheckpointError for a directory of another kind, and where its parts are invalid or do not
    fit together, ConfigError for a `mask_id` that is not the model's.
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
    config = files.parts["transformer"].config
    row = int(config["vocab_size"]) - 1
    if settings.whole("mask_token_id", least=0) != row:
        raise CheckpointError(f"{SCHEDULER}: mask_token_id: expected {row}, the transformer's last")
    codec = load_codec(files.parts["vqvae"], device)
    encoder = load_text_encoder(
        files.parts["text_encoder"], folder / "tokenizer", dtype=dtype, device=device
    )
    sizes = encoder.model.config
    got = codec.codebook_size, sizes.hidden_size, sizes.projection_dim
    wanted = denoiser.vocab_size, config["encoder_hidden_size"], config["cond_embed_dim"]
    if got != wanted:
        raise CheckpointError(
            f"{folder}: codes, states and vector of the codec and the text encoder: {got}; the "
            f"transformer is for {wanted}"
        )
    check_mask_id(mask_id, denoiser.vocab_size)
    side = int(config["sample_size"]) * codec.stride
    kept = {
        part: {name: (folder / part / name).read_bytes()}
        for part, name in ((".", MODEL_INDEX), ("scheduler", SCHEDULER))
    }
    return Pipeline(
        denoiser,
        TokenSpace(denoiser.vocab_size, mask_id=denoiser.vocab_size),
        text_to_image(codec=codec, size=(side, side), encoder=encoder, files=kept),
        window=denoiser.window,
        sampler="amused",
    )


def load_codec(files: ModelFiles, device: torch.device) -> VQDiffusers:
    """The VQModel in a folder of the layout of diffusers, in float32."""
    with without_memory():
        codec = vq_diffusers(described=files.config)
    codec.stored = {name: TYPES[entry["dtype"]] for name, entry in files.entries.items()}
    return codec.read(files.headers, device=device)
