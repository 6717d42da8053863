"""What the codecs of other projects share: their config.json, their pixels, their files.

A family has one file in codecs/: `KEYS` are those of its config.json, and its function makes the
codec of one, without weights. The files are read into `published`, a tree of the same
layers under the names that the family gives them; `codec.load_codec` does both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import CONFIG, Fields, Header, load_weights, without_memory
from mdiff.modalities.image.codec import Report, check_pictures, finite
from mdiff.modalities.image.codec_files import PUBLISHED_TENSORS
from mdiff.modalities.image.codecs.networks.coding import NetworkCodec
from mdiff.modalities.image.codecs.networks.vqgan import (
    GROUPS,
    Decoder,
    Encoder,
    Names,
    Shape,
    published_tree,
    submodule,
)

MOST_LEVELS, MOST_MULTIPLIER, MOST_BLOCKS = 10, 64, 32


class PublishedCodec(NetworkCodec):
    """A Codec that another project trained.

    `described` is its config.json. `published` has the layers by the names in the files, and the
    buffers of `optional` that files may hold and nothing here reads; `stored` are the types of
    tensors in the files that it was read from, where they are to be written again.
    """

    # More would round otherwise, and with it a code here and there would be another.
    at_once = 1
    decoder: Decoder
    weights_file: ClassVar[str] = PUBLISHED_TENSORS
    # Attention and group norms read the whole picture.
    receptive_field_margin: int | None = None

    def __init__(
        self, described: Mapping[str, object], shape: Shape, *, codebook_size: int,
        codes_per_position: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.described, self.channels = dict(described), shape.channels
        self.stride, self.codebook_size = 1 << len(shape.widths) - 1, codebook_size
        self.codes_per_position = codes_per_position
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        self.kept: set[str] = set()
        self.stored: dict[str, torch.dtype] = {}

    def _named(self, names: Names) -> None:
        """Make `published`, once all layers are there."""
        tree = published_tree(self, names, levels=len(self.decoder.up))
        # Not a submodule of this one: its layers would be in the state twice.
        object.__setattr__(self, "published", tree)
        self.published: nn.Module
        self.eval().requires_grad_(False)

    def read(self, headers: Mapping[Path, Header], *, device: torch.device | str = "cpu") -> Self:
        """Read the weights in files, as float32; every tensor is accounted for."""
        there = {name for header in headers.values() for name in header}
        with without_memory():
            for name in sorted(there & self.optional().keys()):
                self.keep(name)
        load_weights(self.published, headers, dtype=torch.float32, device=device)
        return self.requires_grad_(False).eval()

    def fit(self, images: Tensor, *, seed: int = 0, report: Report | None = None) -> Self:
        """Refused: it was trained elsewhere."""
        check_pictures(images, channels=self.channels, stride=self.stride)
        raise ConfigError(f"codec {self.name}: loaded from its files, not trained here")

    def config(self) -> dict[str, object]:
        """The options that the family's function takes back, with the name."""
        return {"name": self.name, "config": self.described}

    @property
    def layers(self) -> nn.Module:
        """The layers by their published names."""
        return self.published

    def state(self) -> dict[str, Tensor]:
        """The weights by their published names, without buffers that nothing reads."""
        return {n: x for n, x in super().state().items() if n not in self.kept}

    def optional(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of buffers that files may hold and nothing here reads."""
        return {}

    def keep(self, name: str) -> None:
        """Have an optional buffer, so that it is loaded and saved again."""
        owner, _, last = name.rpartition(".")
        empty = torch.empty(self.optional()[name])
        submodule(self.published, owner).register_buffer(last, empty)
        self.kept.add(name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and the weights in the layout and the types that they came in."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / CONFIG).write_text(json.dumps(self.described, indent=2) + "\n")
        tensors = {
            name: tensor.to("cpu", self.stored.get(name, tensor.dtype)).contiguous()
            for name, tensor in self.published.state_dict().items()
        }
        save_file(tensors, Path(folder) / self.weights_file, metadata={"format": "pt"})


class Codebook(nn.Module):
    """The codes (K, D) under their published name."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)


class VQGANCodec(PublishedCodec):
    """A published codec whose ids are rows of a codebook, searched by Euclidean distance."""

    def __init__(
        self, described: Mapping[str, object], shape: Shape, names: Names, *, codebook_size: int,
        code_width: int,
    ) -> None:  # fmt: skip
        super().__init__(described, shape, codebook_size=codebook_size)
        self.quantize = Codebook(codebook_size, code_width)
        self.quant_conv = nn.Conv2d(shape.latent, code_width, 1)
        self.post_quant_conv = nn.Conv2d(code_width, shape.latent, 1)
        self._named(names)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) float to (B, D, h, w)."""
        found: Tensor = self.quant_conv(self.encoder(pictures))
        return found

    def table(self) -> Tensor:
        """The codes (K, D)."""
        return finite(self.quantize.embedding.weight)

    def ids(self, latents: Tensor) -> Tensor:
        """The nearest codes: the least |e|^2 - 2 z.e, in float32, of equals the lowest id."""
        rows, table = latents.permute(0, 2, 3, 1).float(), self.table().float()
        distance = table.square().sum(1) - 2 * rows.flatten(0, 2) @ table.mT
        return distance.argmin(1).view(rows.shape[:3])

    def codes(self, ids: Tensor) -> Tensor:
        """The codes (B, D, h, w) of ids (B, h, w)."""
        return self.table()[ids].permute(0, 3, 1, 2)

    def pictures(self, codes: Tensor) -> Tensor:
        """Pictures (B, C, H, W) float of codes (B, D, h, w)."""
        made: Tensor = self.decoder(self.post_quant_conv(codes))
        return made


def widths_of(fields: Fields, name: str, *, width: int) -> tuple[int, ...]:
    """The widths of the levels; CheckpointError where one is no multiple of 32 channels."""
    found = fields.described.get(name)
    if (
        not isinstance(found, list)
        or not 1 <= len(found) <= MOST_LEVELS
        or not all(type(m) is int and 1 <= m <= MOST_MULTIPLIER for m in found)
    ):
        raise CheckpointError(
            f"{fields.origin}: {name}={found!r:.80}: expected a list of 1 to {MOST_LEVELS} whole "
            f"numbers, 1 to {MOST_MULTIPLIER}"
        )
    if width % GROUPS:
        raise CheckpointError(f"{fields.origin}: {width} channels: expected a multiple of {GROUPS}")
    return tuple(width * multiplier for multiplier in found)
