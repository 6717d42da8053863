"""VQModel of the diffusers layout: the codec of aMUSEd (Patil et al. 2024) and of others.

Project huggingface/diffusers, `models/autoencoders/vq_model.py`, 0.42 (2026).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_LAYERS, Fields
from mdiff.modalities.image.codecs.networks.published import VQGANCodec
from mdiff.modalities.image.codecs.networks.vqgan import DIFFUSERS, Shape

CLASS_NAME = "VQModel"
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# Levels of a codec, each half the resolution of the one before it.
MOST_LEVELS = 16


class VQDiffusers(VQGANCodec):
    """The codec; see `vq_diffusers`. Pixels are 0 to 1 inside."""

    name = "vq_diffusers"
    signed = False
    weights_file = "diffusion_pytorch_model.safetensors"

    def ids(self, latents: Tensor) -> Tensor:
        """The nearest codes (B, h, w), by the distances that the official code takes."""
        rows = latents.permute(0, 2, 3, 1)
        return torch.cdist(rows.flatten(0, 2), self.table()).argmin(1).view(rows.shape[:3])

    def config(self) -> dict[str, object]:
        """The options that `vq_diffusers` takes back, with the name."""
        return {"name": self.name, "described": self.described}


def _wholes(fields: Fields, name: str) -> list[int]:
    values = fields.described.get(name)
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_LEVELS:
        raise CheckpointError(f"{fields.origin}: {name}: expected a list of 1 to {MOST_LEVELS}")
    return [Fields({name: value}, fields.origin).whole(name) for value in values]


def _kinds(fields: Fields, name: str, known: Mapping[str, bool], count: int) -> list[bool]:
    """Whether each level attends, by the names of its blocks."""
    values = fields.described.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise CheckpointError(f"{fields.origin}: {name}: expected a list of {count}, one a level")
    for value in values:
        Fields({name: value}, fields.origin).choice(name, tuple(known))
    return [known[value] for value in values]


def vq_diffusers(*, described: Mapping[str, object]) -> VQDiffusers:
    """The codec of a config.json of the diffusers layout, `_class_name` VQModel, to be loaded.

    Raises CheckpointError for a config that is invalid or not supported.
    """
    if not isinstance(described, Mapping):
        raise CheckpointError("codec.described: expected the object of a config.json")
    if described.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"config.json: expected _class_name {CLASS_NAME}")
    fields = Fields(described)
    fields.choice("act_fn", ("silu", "swish"), default="silu")
    fields.choice("norm_type", ("group",), default="group")
    widths = _wholes(fields, "block_out_channels")
    groups = fields.whole("norm_num_groups", default=32)
    for width in widths:
        if width % groups:
            raise CheckpointError(
                f"config.json: norm_num_groups={groups} does not divide {width} channels"
            )
    channels, latent = fields.whole("in_channels"), fields.whole("latent_channels")
    if fields.whole("out_channels") != channels:
        raise CheckpointError("config.json: in_channels and out_channels: expected the same")
    blocks = fields.whole("layers_per_block", most=MOST_LAYERS, default=1)
    shape = Shape(
        channels=channels, width=widths[0], widths=tuple(widths), latent=latent, blocks=blocks,
        decoder_blocks=blocks + 1, groups=groups, linear=True,
        attends=_kinds(fields, "down_block_types", DOWN, len(widths)),
        decoder_attends=_kinds(fields, "up_block_types", UP, len(widths))[::-1],
        middle_attends=fields.flag("mid_block_add_attention", default=True),
    )  # fmt: skip
    # Null means as many as there are channels.
    given = described.get("vq_embed_dim") is not None
    return VQDiffusers(
        described, shape, DIFFUSERS, code_width=fields.whole("vq_embed_dim") if given else latent,
        codebook_size=fields.whole("num_vq_embeddings", most=MOST_IDS),
    )  # fmt: skip
