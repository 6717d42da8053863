"""VQModel of the diffusers layout: the codec of aMUSEd (Patil et al. 2024) and of others.

Project huggingface/diffusers, `models/autoencoders/vq_model.py`, 0.42 (2026).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import CONFIG, MOST_IDS, MOST_LAYERS, Fields
from mdiff.modalities.image.codec import Report, check_ids, check_pictures
from mdiff.modalities.image.codecs.networks.diffusers import Decoder, Encoder
from mdiff.modalities.image.codecs.networks.fit import take_state

CLASS_NAME = "VQModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
# Levels of a codec, each half the resolution of the one before it.
MOST_LEVELS = 16
WHITE = 255


class Codebook(nn.Module):
    """The codes (K, D), named as in the files."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)


class VQDiffusers(nn.Module):
    """The codec; see `vq_diffusers`. Pixels 0 to 255 are 0 to 1 inside.

    `described` is its config.json. Norms are over the whole picture, and so is what a token
    reads.
    """

    name = "vq_diffusers"
    lossless = False
    codes_per_position = 1
    receptive_field_margin = None

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__()
        self.described = dict(described)
        # The types of the files that it was loaded from; none where it was not.
        self.stored: dict[str, torch.dtype] = {}
        fields = Fields(described)
        fields.choice("act_fn", ("silu", "swish"), default="silu")
        fields.choice("norm_type", ("group",), default="group")
        widths = _wholes(fields, "block_out_channels")
        down = _kinds(fields, "down_block_types", DOWN, len(widths))
        up = _kinds(fields, "up_block_types", UP, len(widths))
        groups = fields.whole("norm_num_groups", default=32)
        for width in widths:
            if width % groups:
                raise CheckpointError(
                    f"config.json: norm_num_groups={groups} does not divide {width} channels"
                )
        self.channels, latent = fields.whole("in_channels"), fields.whole("latent_channels")
        if fields.whole("out_channels") != self.channels:
            raise CheckpointError("config.json: in_channels and out_channels: expected the same")
        self.stride = 1 << (len(widths) - 1)
        self.codebook_size = fields.whole("num_vq_embeddings", most=MOST_IDS)
        # Null means as many as there are channels.
        given = described.get("vq_embed_dim") is not None
        inside = fields.whole("vq_embed_dim") if given else latent
        attends = fields.flag("mid_block_add_attention", default=True)
        shape: dict[str, Any] = {
            "depth": fields.whole("layers_per_block", most=MOST_LAYERS, default=1),
            "groups": groups, "middle_attends": attends,
        }  # fmt: skip
        self.encoder = Encoder(self.channels, latent, widths, attends=down, **shape)
        self.quant_conv = nn.Conv2d(latent, inside, 1)
        self.quantize = Codebook(self.codebook_size, inside)
        self.post_quant_conv = nn.Conv2d(inside, latent, 1)
        self.decoder = Decoder(latent, self.channels, widths, attends=up, **shape)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """The features (B, D, h, w) that are quantised, of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        weight = self.quant_conv.weight
        scaled = images.to(weight.device).to(weight.dtype) / WHITE
        found: Tensor = self.quant_conv(self.encoder(scaled))
        return found

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The nearest codes (B, h, w) int64 of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        height, width = (side // self.stride for side in images.shape[2:])
        ids = torch.empty(len(images), height, width, dtype=torch.int64, device=images.device)
        # One at a time: a picture of this kind fills the processor, and a batch rounds otherwise.
        for row, one in enumerate(images):
            places = self.latents(one[None])[0].flatten(1).T
            nearest = torch.cdist(places, self.quantize.embedding.weight).argmin(1)
            ids[row] = nearest.view(height, width)
        return ids

    @torch.no_grad()
    def decoded(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) of ids as they leave the network, mostly in [0, 1]."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=1)
        codes = self.quantize.embedding(ids.to(self.quant_conv.weight.device))
        made: Tensor = self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))
        return made

    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=1)
        height, width = (side * self.stride for side in ids.shape[1:])
        made = torch.empty(
            len(ids), self.channels, height, width, dtype=torch.uint8, device=ids.device
        )
        for row, one in enumerate(ids):
            picture = self.decoded(one[None])[0]
            made[row] = (picture.float().clamp(0, 1) * WHITE).round().to(torch.uint8)
        return made

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Refused: this codec comes with what it has learnt."""
        raise ConfigError(f"codec {self.name!r} is not trained here: use vq, bits or kmeans")

    def config(self) -> dict[str, Any]:
        """The options that `vq_diffusers` takes back, with the name."""
        return {"name": self.name, "described": self.described}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and the weights in the layout and the types that they came in."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.described, indent=2) + "\n")
        tensors = {
            name: tensor.to("cpu", self.stored.get(name, tensor.dtype)).contiguous()
            for name, tensor in self.state_dict().items()
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def state(self) -> dict[str, Tensor]:
        """The weights, named as in the published files."""
        return dict(self.state_dict())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where a tensor is missing or of another shape."""
        take_state(self, tensors)


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


def vq_diffusers(*, described: Mapping[str, Any]) -> VQDiffusers:
    """The codec of a config.json of the diffusers layout, `_class_name` VQModel, to be loaded.

    Raises CheckpointError for a config that cannot be meant or is not supported.
    """
    if not isinstance(described, Mapping):
        raise CheckpointError("codec.described: expected the object of a config.json")
    if described.get("_class_name") != CLASS_NAME:
        raise CheckpointError(f"config.json: expected _class_name {CLASS_NAME}")
    return VQDiffusers(described)
