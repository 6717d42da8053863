"""The VQGAN of taming-transformers (Esser et al. 2021): `taming.models.vqgan.VQModel`.

config.json is the `model:` node of the published yaml: {"target", "params": {"embed_dim",
"n_embed", "ddconfig": {...}}}. The codebook is searched by Euclidean distance as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_WIDTH, Fields
from mdiff.modalities.image.codecs.networks.published import (
    MOST_BLOCKS,
    PublishedCodec,
    multipliers,
    nearest_code,
)
from mdiff.modalities.image.codecs.networks.vqgan import TAMING, Decoder, Encoder, Shape

TARGETS = ("taming.models.vqgan.VQModel",)
EXPECTED = "params.ddconfig, params.embed_dim, params.n_embed"


class Quantizer(nn.Module):
    """The codebook under its published name."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class Taming(PublishedCodec):
    """The codec; see `taming`. Pixels are -1 to 1 inside."""

    name = "taming"

    def __init__(
        self, described: Mapping[str, Any], shape: Shape, *, codebook_size: int, code_width: int
    ) -> None:
        super().__init__(
            described, stride=1 << len(shape.multipliers) - 1, codebook_size=codebook_size,
            channels=shape.channels,
        )  # fmt: skip
        self.encoder, self.decoder = Encoder(shape, TAMING), Decoder(shape, TAMING)
        self.quantize = Quantizer(codebook_size, code_width)
        self.quant_conv = nn.Conv2d(shape.latent, code_width, 1)
        self.post_quant_conv = nn.Conv2d(code_width, shape.latent, 1)
        self.eval().requires_grad_(False)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1] to (B, D, h, w)."""
        found: Tensor = self.quant_conv(self.encoder(pictures))
        return found

    def ids(self, latents: Tensor) -> Tensor:
        """The nearest codes."""
        return nearest_code(latents, self.quantize.embedding.weight)

    def codes(self, ids: Tensor) -> Tensor:
        """The codes (B, D, h, w) of ids (B, h, w)."""
        return self.quantize.embedding.weight[ids].permute(0, 3, 1, 2)

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, C, H, W) around [-1, 1]."""
        made: Tensor = self.decoder(self.post_quant_conv(codes))
        return made


def recognises(described: Mapping[str, Any]) -> bool:
    """Whether this is the `model:` node of a taming VQGAN's yaml."""
    params = described.get("params")
    return isinstance(params, dict) and "ddconfig" in params


def taming(*, config: Mapping[str, Any]) -> Taming:
    """The codec of a taming VQGAN's config, without its weights; CheckpointError says what is
    not supported.
    """
    params = config.get("params")
    if not isinstance(params, Mapping) or not isinstance(params.get("ddconfig"), Mapping):
        raise CheckpointError(f"config.json: expected {EXPECTED}")
    Fields(config).choice("target", TARGETS, default=TARGETS[0])
    outer = Fields(params, "config.json: params")
    for name in ("remap", "sane_index_shape"):
        outer.choice(name, (False,), default=False)
    inner = Fields(params["ddconfig"], "config.json: params.ddconfig")
    for name, only in (("double_z", False), ("resamp_with_conv", True)):
        inner.choice(name, (only,), default=only)
    channels = inner.whole("in_channels", most=16)
    inner.choice("out_ch", (channels,))
    width = inner.whole("ch", most=MOST_WIDTH)
    found = multipliers(inner, "ch_mult", width=width)
    resolution = inner.whole("resolution", most=MOST_WIDTH)
    attended = inner.described.get("attn_resolutions", [])
    if not isinstance(attended, list) or not all(type(side) is int for side in attended):
        raise CheckpointError(f"{inner.origin}: attn_resolutions: expected a list of sides")
    shape = Shape(
        channels=channels, width=width, multipliers=found,
        blocks=inner.whole("num_res_blocks", most=MOST_BLOCKS),
        attends=tuple(resolution >> level in attended for level in range(len(found))),
        latent=inner.whole("z_channels"),
    )  # fmt: skip
    return Taming(
        config, shape, codebook_size=outer.whole("n_embed", most=MOST_IDS),
        code_width=outer.whole("embed_dim"),
    )  # fmt: skip
