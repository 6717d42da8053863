"""Pictures that a text encoder describes: the canvas is a picture alone, its words a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.denoiser import MICRO
from mdiff.errors import ConfigError
from mdiff.modalities.image.codec import Codec
from mdiff.modalities.image.data.examples import PictureRows
from mdiff.modalities.image.modality import ImageModality
from mdiff.modalities.image.text_encoder import TextEncoder, write_files
from mdiff.tokens import Batch

# How pleasing a picture is to be, on LAION's scale; what aMUSEd asks for (Patil et al. 2024).
AESTHETIC_SCORE = 6.0


class Described(ImageModality):
    """Pictures told of in words; see `described`.

    `folders` are the parts of the published directory beside the denoiser's, which lies in
    `denoiser_folder`; `files` what else is in it, by folder and name.
    """

    name = "described"
    denoiser_folder = "transformer"

    def __init__(
        self, codec: Codec, *, size: tuple[int, int], encoder: TextEncoder,
        files: Mapping[str, Mapping[str, bytes]],
    ) -> None:  # fmt: skip
        super().__init__(codec, size=size, labels=None, label="none", captions=None)
        self.encoder, self.files = encoder, files

    @property
    def takes(self) -> tuple[str, ...]:
        """What a prompt may give."""
        return ("image", "caption")

    @property
    def folders(self) -> dict[str, nn.Module]:
        """The modules beside the denoiser, by the folder that each lies in."""
        return {"vqvae": self.codec.published, "text_encoder": self.encoder.model}

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """The null condition of guidance: that of the empty text."""
        return self.encode_condition("")

    def encode_condition(self, text: str) -> dict[str, Tensor]:
        """The condition of a text, each tensor (1, ...).

        The numbers on the picture are its width, its height, the corner (0, 0) it is cut at and
        `AESTHETIC_SCORE`.
        """
        height, width = self.size
        numbers = torch.tensor(
            [[width, height, 0.0, 0.0, AESTHETIC_SCORE]], dtype=torch.float32, device="cpu"
        )
        return {**self.encoder.told(text), MICRO: numbers}

    def condition(self, prompt: object = "") -> dict[str, Tensor]:
        """What the denoiser is told of a prompt: of its caption, or of the empty text."""
        asked = self._asked(prompt) if isinstance(prompt, str | Mapping) else {}
        made = self.encode_condition(asked.get("caption", ""))
        return {name: tensor[0] for name, tensor in made.items()}

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The picture's places, with what a prompt gives of it; a caption is in none of them."""
        asked = self._asked(prompt)
        return super().canvas({k: v for k, v in asked.items() if k != "caption"}, length)

    def _rows(
        self, codes: Tensor, labels: Tensor | None, captions: list[str] | None,
        length: int | None, slice_sha256: str,
    ) -> PictureRows:  # fmt: skip
        plain = super()._rows(codes, labels, captions, length, slice_sha256)
        return DescribedRows(plain, self, captions or [""] * len(plain))

    def config(self) -> dict[str, object]:
        """What it is made of."""
        read = self.encoder.model.config
        return {
            "name": self.name,
            "codec": self.codec.config(),
            "size": list(self.size),
            "encoder": {"name": type(self.encoder.model).__name__, "places": self.encoder.length,
                        "width": read.hidden_size},
        }  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write every part of the directory but the denoiser's."""
        codec: Any = self.codec
        codec.save_pretrained(Path(folder) / "vqvae")
        self.encoder.save(Path(folder) / "text_encoder", Path(folder) / "tokenizer")
        for part, files in self.files.items():
            write_files(Path(folder) / part, files)


class DescribedRows(PictureRows):
    """Rows whose captions are encoded as their batch is asked for: their vectors are large."""

    def __init__(self, plain: PictureRows, modality: Described, captions: Sequence[str]) -> None:
        super().__init__(
            plain.tokens.long(), cond={}, unit=plain.unit, units=plain.units,
            slice_sha256=plain.slice_sha256,
        )  # fmt: skip
        self.modality, self.captions = modality, list(captions)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 with what is told of each."""
        plain = super().batch(rows, epoch)
        told = [self.modality.condition({"caption": self.captions[row]}) for row in rows.tolist()]
        cond = {name: torch.stack([one[name] for one in told]) for name in told[0]}
        return Batch(plain.tokens, cond=cond)


def described(
    *,
    codec: Codec,
    size: Sequence[int],
    encoder: TextEncoder,
    files: Mapping[str, Mapping[str, bytes]],
) -> Described:
    """The modality of a codec's pictures, `size` (H, W) pixels, told of by a text encoder.

    It is made of parts of a published directory, not by name from a recipe. Raises ConfigError
    for a size that the codec's places do not divide.
    """
    height, width = size
    if height % codec.stride or width % codec.stride:
        raise ConfigError(f"size={height} x {width}: the codec's places have {codec.stride} pixels")
    return Described(codec, size=(height, width), encoder=encoder, files=files)
