"""A convolutional VQ autoencoder (van den Oord et al. 2017; the shape of Esser et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.modalities.image.codec import CODES_KEY, Report, check_ids, check_pictures
from mdiff.modalities.image.codecs.networks.autoencoder import (
    CODED_AT_ONCE,
    Decoder,
    Encoder,
    check_counts,
    pixels,
    scaled,
)
from mdiff.modalities.image.codecs.networks.fit import Training, fit_networks, take_state


class VQ(nn.Module):
    """The codec; see `vq`. Pixels 0 to 255 are -1 to 1 inside."""

    name = "vq"
    lossless = False

    def __init__(
        self, *, channels: int, stride: int, codebook_size: int, code_width: int,
        codes_per_position: int, width: int, blocks: int, local: bool, training: Training,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels, self.stride, self.codes_per_position = channels, stride, codes_per_position
        self.codebook_size, self.code_width = codebook_size, code_width
        self.width, self.blocks, self.local, self.training_plan = width, blocks, local, training
        inside = codes_per_position * code_width
        self.encoder = Encoder(
            channels=channels, width=width, stride=stride, blocks=blocks, out=inside,
            kernel=1 if local else 3,
        )  # fmt: skip
        self.decoder = Decoder(
            channels=channels, width=width, stride=stride, blocks=blocks, inputs=inside
        )
        # Unit vectors, one table for each code of a position; what is learnt replaces them.
        table = torch.empty(codes_per_position, codebook_size, code_width)
        if not table.is_meta:
            table = F.normalize(torch.randn(table.shape), dim=2)
        self.register_buffer("codebook", table)
        self.codebook: Tensor
        self.eval().requires_grad_(False)

    @property
    def receptive_field_margin(self) -> int:
        """Pixels beyond its patch that a token reads, each way."""
        return self.encoder.receptive_field_margin

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The nearest codes, (B, h, w) or (B, h, w, n) int64, of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        found = []
        for some in torch.split(images, CODED_AT_ONCE):
            codes = self._unit(self.encoder(scaled(some)))
            found.append(torch.einsum("bhwsd,skd->bhwsk", codes, self.codebook).argmax(-1))
        ids = torch.cat(found)
        return ids[..., 0] if self.codes_per_position == 1 else ids

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=self.codes_per_position)
        ids = ids[..., None] if self.codes_per_position == 1 else ids
        number = torch.arange(self.codes_per_position, device=ids.device)
        return torch.cat([
            pixels(self.decoder(self.codebook[number, some].flatten(3).permute(0, 3, 1, 2)))
            for some in torch.split(ids, CODED_AT_ONCE)
        ])  # fmt: skip

    def _unit(self, features: Tensor) -> Tensor:
        """Features (B, n D, h, w) as unit codes (B, h, w, n, D)."""
        rows = features.permute(0, 2, 3, 1)
        codes = rows.reshape(*rows.shape[:3], self.codes_per_position, self.code_width)
        return F.normalize(codes, dim=4)

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Train encoder, codebook and decoder on pictures (N, C, H, W) uint8."""
        from vector_quantize_pytorch import VectorQuantize

        check_pictures(images, channels=self.channels, stride=self.stride)
        plan = self.training_plan

        def quantizer() -> Any:
            # Cosine codes of few dimensions (Yu et al. 2022, section 3.2), tables by moving
            # averages, codes that nothing uses set anew.
            return VectorQuantize(
                dim=self.codes_per_position * self.code_width, heads=self.codes_per_position,
                codebook_dim=self.code_width, codebook_size=self.codebook_size,
                separate_codebook_per_head=self.codes_per_position > 1, use_cosine_sim=True,
                kmeans_init=True, kmeans_iters=10, decay=plan.decay,
                threshold_ema_dead_code=plan.revive_below, commitment_weight=plan.commitment,
                rotation_trick=True, accept_image_fmap=True,
            )  # fmt: skip

        made = fit_networks(
            self.encoder, quantizer, self.decoder, images, plan=plan, seed=seed, report=report
        )
        table = made._codebook.embed.detach()
        self.codebook.copy_(F.normalize(table.reshape(self.codebook.shape), dim=2))
        self.eval().requires_grad_(False)
        return self

    def config(self) -> dict[str, Any]:
        """The options that `vq` takes back, with the name."""
        return {
            "name": self.name, "channels": self.channels, "stride": self.stride,
            "codebook_size": self.codebook_size, "code_width": self.code_width,
            CODES_KEY: self.codes_per_position, "width": self.width, "blocks": self.blocks,
            "local": self.local,
        } | self.training_plan.changed()  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Weights and codebook."""
        return dict(self.state_dict())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where a tensor is missing or of another shape."""
        take_state(self, tensors)


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
    **training: Any,
) -> VQ:
    """A VQ codec, to be fitted.

    A position, `stride` x `stride` pixels, has `codes_per_position` codes out of `codebook_size`
    each; codes are unit vectors of `code_width`. `width` channels at full resolution, `blocks`
    residual blocks at each. `local` encoders read their own patch alone
    (`receptive_field_margin` 0), so that an edit regenerates no
    more than it must. `training` are the numbers of `Training`.

    Raises ConfigError for what cannot be meant.
    """
    check_counts(
        channels=channels, stride=stride, codebook_size=codebook_size, code_width=code_width,
        codes_per_position=codes_per_position, width=width, blocks=blocks,
    )  # fmt: skip
    return VQ(
        channels=channels, stride=stride, codebook_size=codebook_size, code_width=code_width,
        codes_per_position=codes_per_position, width=width, blocks=blocks, local=local,
        training=Training.of(training),
    )  # fmt: skip
