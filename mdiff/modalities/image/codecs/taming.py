"""The VQGAN of taming-transformers (Esser et al. 2021): `taming.models.vqgan.VQModel`.

config.json is the `model:` node of the published yaml: {"target", "params": {"embed_dim",
"n_embed", "ddconfig": {...}}}. The codebook is searched by Euclidean distance as it is.
"""

from collections.abc import Mapping

from mdiff.errors import CheckpointError
from mdiff.files import MOST_IDS, MOST_WIDTH, Fields
from mdiff.modalities.image.codecs.networks.published import MOST_BLOCKS, VQGANCodec, widths_of
from mdiff.modalities.image.codecs.networks.vqgan import TAMING, Shape

# By which its config.json is known.
KEYS = ("params.ddconfig",)
TARGETS = ("taming.models.vqgan.VQModel",)
EXPECTED = "params.ddconfig, params.embed_dim, params.n_embed"


class Taming(VQGANCodec):
    """The codec; see `taming`. Pixels are -1 to 1 inside."""

    name = "taming"


def taming(*, config: Mapping[str, object]) -> Taming:
    """The codec of a taming VQGAN's config, without its weights.

    Raises CheckpointError with the entry that is not supported.
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
    widths = widths_of(inner, "ch_mult", width=width)
    resolution = inner.whole("resolution", most=MOST_WIDTH)
    attended = inner.described.get("attn_resolutions", [])
    if not isinstance(attended, list) or not all(type(side) is int for side in attended):
        raise CheckpointError(f"{inner.origin}: attn_resolutions: expected a list of sides")
    attends = [resolution >> level in attended for level in range(len(widths))]
    blocks = inner.whole("num_res_blocks", most=MOST_BLOCKS)
    shape = Shape(
        channels=channels, width=width, widths=widths, blocks=blocks, decoder_blocks=blocks + 1,
        attends=attends, decoder_attends=attends, latent=inner.whole("z_channels"),
    )  # fmt: skip
    return Taming(
        config, shape, TAMING, codebook_size=outer.whole("n_embed", most=MOST_IDS),
        code_width=outer.whole("embed_dim"),
    )  # fmt: skip
