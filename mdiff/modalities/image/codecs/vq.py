"""A convolutional VQ autoencoder (van den Oord et al. 2017; the shape of Esser et al. 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.modalities.image.codec import finite
from mdiff.modalities.image.codecs.networks.autoencoder import check_counts
from mdiff.modalities.image.codecs.networks.fit import Training
from mdiff.modalities.image.codecs.networks.learned import LearnedCodec, NetworkOptions


class VQ(LearnedCodec):
    """The codec; see `vq`. `codebook` (n, K, D) float32 has a table for each code of a position."""

    name = "vq"

    def __init__(self, options: NetworkOptions, *, codebook_size: int, code_width: int) -> None:
        super().__init__(options, codebook_size=codebook_size, code_width=code_width)
        # Unit vectors, which what is learnt replaces.
        table = torch.empty(options.codes_per_position, codebook_size, code_width)
        if not table.is_meta:
            table = F.normalize(torch.randn(table.shape), dim=2)
        self.register_buffer("codebook", table)
        self.codebook: Tensor
        self.eval().requires_grad_(False)

    def ids(self, features: Tensor) -> Tensor:
        """The codes of the largest cosine, (B, h, w[, n]) int64."""
        rows = features.permute(0, 2, 3, 1)
        codes = rows.reshape(*rows.shape[:3], self.codes_per_position, self.code_width)
        unit = F.normalize(codes, dim=4)
        ids = torch.einsum("bhwsd,skd->bhwsk", unit, finite(self.codebook)).argmax(-1)
        return ids[..., 0] if self.codes_per_position == 1 else ids

    def codes(self, ids: Tensor) -> Tensor:
        """The codes (B, n D, h, w) of ids."""
        ids = ids[..., None] if self.codes_per_position == 1 else ids
        number = torch.arange(self.codes_per_position, device=ids.device)
        return self.codebook[number, ids].flatten(3).permute(0, 3, 1, 2)

    def new_quantizer(self) -> nn.Module:
        """Cosine codes of few dimensions (Yu et al. 2022, section 3.2).

        The tables are moving averages; codes that are not used are replaced.
        """
        from vector_quantize_pytorch import VectorQuantize

        plan, codes = self.options.training, self.codes_per_position
        made: nn.Module = VectorQuantize(
            dim=codes * self.code_width, heads=codes, codebook_dim=self.code_width,
            codebook_size=self.codebook_size, separate_codebook_per_head=codes > 1,
            use_cosine_sim=True, kmeans_init=True, kmeans_iters=10, decay=plan.decay,
            threshold_ema_dead_code=plan.revive_below, commitment_weight=plan.commitment,
            rotation_trick=True, accept_image_fmap=True,
        )  # fmt: skip
        return made

    def learn(self, quantizer: nn.Module) -> None:
        """Take over the tables."""
        table = quantizer.get_submodule("_codebook").get_buffer("embed").detach()
        self.codebook.copy_(F.normalize(table.reshape(self.codebook.shape), dim=2))

    def config(self) -> dict[str, object]:
        """The options that `vq` takes back, with the name."""
        own = {"codebook_size": self.codebook_size, "code_width": self.code_width}
        return super().config() | own


def vq(
    *,
    channels: int = 3,
    stride: int = 4,
    codebook_size: int = 1024,
    code_width: int = 8,
    codes_per_position: int = 1,
    width: int = 32,
    blocks: int = 1,
    local: bool = False,
    **training: float,
) -> VQ:
    """A VQ codec, to be fitted.

    A position, `stride` x `stride` pixels, has `codes_per_position` codes out of `codebook_size`
    each; codes are unit vectors of `code_width`. `width` channels at full resolution, `blocks`
    residual blocks at each. `local` encoders read their own patch alone
    (`receptive_field_margin` 0), so that an edit regenerates no more than it must. `training` are
    the numbers of `Training`.

    Raises ConfigError for invalid options.
    """
    check_counts(codebook_size=codebook_size, code_width=code_width)
    options = NetworkOptions(
        channels=channels, stride=stride, codes_per_position=codes_per_position, width=width,
        blocks=blocks, local=local, training=Training.of(training),
    )  # fmt: skip
    return VQ(options, codebook_size=codebook_size, code_width=code_width)
