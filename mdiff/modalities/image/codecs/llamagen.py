"""The tokenizer of LlamaGen (Sun et al. 2024), VQ-16 and VQ-8; Halton-MaskGIT uses it too.

config.json holds the constructor's arguments: codebook_size, codebook_embed_dim,
encoder_ch_mult, decoder_ch_mult, z_channels. Codes and latents are of unit length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.files import MOST_IDS, Fields
from mdiff.modalities.image.codecs.networks.published import (
    PublishedCodec,
    multipliers,
    nearest_code,
)
from mdiff.modalities.image.codecs.networks.vqgan import LLAMAGEN, Decoder, Encoder, Shape

# Fixed in the published class.
CHANNELS, WIDTH, BLOCKS = 3, 128, 2
# Past ids that training kept, to say how much of the codebook is in use.
USED = 65536


class Quantizer(nn.Module):
    """The codebook under its published name."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class LlamaGen(PublishedCodec):
    """The codec; see `llamagen`. Pixels are -1 to 1 inside."""

    name = "llamagen"

    def __init__(
        self, described: Mapping[str, Any], *, levels: tuple[int, ...], latent: int,
        codebook_size: int, code_width: int, unit: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            described, stride=1 << len(levels) - 1, codebook_size=codebook_size, channels=CHANNELS
        )
        attends = tuple(level == len(levels) - 1 for level in range(len(levels)))
        shape = Shape(CHANNELS, WIDTH, levels, BLOCKS, attends, latent)
        self.unit = unit
        self.encoder, self.decoder = Encoder(shape, LLAMAGEN), Decoder(shape, LLAMAGEN)
        self.quantize = Quantizer(codebook_size, code_width)
        self.quant_conv = nn.Conv2d(latent, code_width, 1)
        self.post_quant_conv = nn.Conv2d(code_width, latent, 1)
        self.eval().requires_grad_(False)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to (B, D, h, w), not yet of unit length."""
        found: Tensor = self.quant_conv(self.encoder(pictures))
        return found

    def table(self) -> Tensor:
        """The codes (K, D)."""
        table = self.quantize.embedding.weight
        return F.normalize(table, dim=1) if self.unit else table

    def ids(self, latents: Tensor) -> Tensor:
        """The nearest codes; of unit codes the nearest is the same for any length of a latent."""
        return nearest_code(latents, self.table())

    def codes(self, ids: Tensor) -> Tensor:
        """The codes (B, D, h, w) of ids (B, h, w)."""
        return self.table()[ids].permute(0, 3, 1, 2)

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) around [-1, 1]."""
        made: Tensor = self.decoder(self.post_quant_conv(codes))
        return made

    def optional(self) -> dict[str, tuple[int, ...]]:
        """The training's record of used ids."""
        return {"quantize.codebook_used": (USED,)}


def recognises(described: Mapping[str, Any]) -> bool:
    """Whether these are the arguments of LlamaGen's tokenizer."""
    return "codebook_embed_dim" in described and "encoder_ch_mult" in described


def llamagen(*, config: Mapping[str, Any]) -> LlamaGen:
    """The codec of LlamaGen's arguments, without its weights; CheckpointError says what is not
    supported.
    """
    fields = Fields(config)
    levels = multipliers(fields, "encoder_ch_mult", width=WIDTH)
    fields.choice("decoder_ch_mult", (list(levels),))
    return LlamaGen(
        config, levels=levels, latent=fields.whole("z_channels", default=256),
        codebook_size=fields.whole("codebook_size", most=MOST_IDS),
        code_width=fields.whole("codebook_embed_dim"),
        unit=fields.flag("codebook_l2_norm", default=True),
    )  # fmt: skip
