"""What codecs with networks share: pictures through an encoder to ids, ids through a decoder."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mdiff.errors import CheckpointError
from mdiff.modalities.image.codec import check_ids, check_pictures, finite


class NetworkCodec(nn.Module):
    """A Codec of an encoder and a decoder; a family writes the steps between.

    Inside, pixels are in [-1, 1], or in [0, 1] where `signed` is false. `at_once` pictures are
    coded together: the finest level's features are what takes memory.
    """

    name: str
    signed: ClassVar[bool] = True
    at_once: ClassVar[int]
    lossless = False
    channels: int
    stride: int
    codebook_size: int
    codes_per_position: int
    encoder: nn.Module
    decoder: nn.Module

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) float to what is quantised (B, D, h, w)."""
        found: Tensor = self.encoder(pictures)
        return found

    @abstractmethod
    def ids(self, latents: Tensor) -> Tensor:
        """The ids (B, h, w[, n]) int64 of latents (B, D, h, w)."""

    @abstractmethod
    def codes(self, ids: Tensor) -> Tensor:
        """What the decoder is given of ids (B, h, w[, n]): (B, D, h, w)."""

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, C, H, W) float of codes (B, D, h, w)."""
        made: Tensor = self.decoder(codes)
        return made

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The ids (B, h, w[, n]) int64 of pictures uint8."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        own, found = next(self.decoder.parameters()).device, []
        for some in torch.split(images, self.at_once):
            bright = some.to(own).float()
            bright = bright / 127.5 - 1 if self.signed else bright / 255
            found.append(self.ids(finite(self.latents(bright))).to(images.device))
        return torch.cat(found)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of ids."""
        check_ids(ids, codebook_size=self.codebook_size, codes_per_position=self.codes_per_position)
        own, made = next(self.decoder.parameters()).device, []
        for some in torch.split(ids, self.at_once):
            pictures = finite(self.pictures(self.codes(some.to(own)))).float()
            bright = (pictures + 1) * 127.5 if self.signed else pictures * 255
            made.append(bright.round().clamp(0, 255).to(ids.device, torch.uint8))
        return torch.cat(made)

    @property
    def layers(self) -> nn.Module:
        """The layers by their names in files."""
        return self

    def state(self) -> dict[str, Tensor]:
        """What has been learnt."""
        return dict(self.layers.state_dict())

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back `state()`; CheckpointError where a tensor is missing or of another shape."""
        wanted = self.state()
        for name, tensor in wanted.items():
            if name not in tensors:
                raise CheckpointError(f"the codec's file lacks {name}")
            if tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the codec's {name} has shape {tuple(tensors[name].shape)}, "
                    f"expected {tuple(tensor.shape)}"
                )
        own = {name: tensors[name].to(x.dtype) for name, x in wanted.items()}
        # A module that was made without memory takes the tensors as they are.
        without_memory = any(x.is_meta for x in wanted.values())
        self.layers.load_state_dict(own, strict=False, assign=without_memory)
