"""The tokenizer of LlamaGen (Sun et al. 2024), VQ-16 and VQ-8; Halton-MaskGIT uses it too.

config.json holds the constructor's arguments: codebook_size, codebook_embed_dim,
encoder_ch_mult, decoder_ch_mult, z_channels. Codes and latents are of unit length.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from mdiff.files import MOST_IDS, Fields
from mdiff.modalities.image.codecs.networks.published import VQGANCodec, widths_of
from mdiff.modalities.image.codecs.networks.vqgan import LLAMAGEN, Shape

# By which its config.json is known.
KEYS = ("codebook_embed_dim", "encoder_ch_mult")
# Fixed in the published class.
CHANNELS, WIDTH, BLOCKS = 3, 128, 2
# Past ids that training kept, to say how much of the codebook is in use.
USED = 65536


class LlamaGen(VQGANCodec):
    """The codec; see `llamagen`. Pixels are -1 to 1 inside."""

    name = "llamagen"
    unit = True

    def table(self) -> Tensor:
        """The codes (K, D), of unit length: the nearest is then that of a latent of any length."""
        table = super().table()
        return F.normalize(table, dim=1) if self.unit else table

    def optional(self) -> dict[str, tuple[int, ...]]:
        """The training's record of used ids."""
        return {"quantize.codebook_used": (USED,)}


def llamagen(*, config: Mapping[str, object]) -> LlamaGen:
    """The codec of LlamaGen's arguments, without its weights.

    Raises CheckpointError with the entry that is not supported.
    """
    fields = Fields(config)
    widths = widths_of(fields, "encoder_ch_mult", width=WIDTH)
    fields.choice("decoder_ch_mult", (fields.described["encoder_ch_mult"],))
    attends = [level == len(widths) - 1 for level in range(len(widths))]
    shape = Shape(
        channels=CHANNELS, width=WIDTH, widths=widths, blocks=BLOCKS, decoder_blocks=BLOCKS + 1,
        attends=attends, decoder_attends=attends, latent=fields.whole("z_channels", default=256),
    )  # fmt: skip
    made = LlamaGen(
        config, shape, LLAMAGEN, codebook_size=fields.whole("codebook_size", most=MOST_IDS),
        code_width=fields.whole("codebook_embed_dim"),
    )  # fmt: skip
    made.unit = fields.flag("codebook_l2_norm", default=True)
    return made
