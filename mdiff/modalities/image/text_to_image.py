"""A text-conditioned image model: the canvas is an image alone, the text a condition."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mdiff.denoiser import MICRO
from mdiff.errors import ConfigError
from mdiff.modalities.image.codecs.networks.published import PublishedCodec
from mdiff.modalities.image.data.examples import PictureRows
from mdiff.modalities.image.modality import ImageModality
from mdiff.modalities.image.text_encoder import TextEncoder, write_files
from mdiff.tokens import Batch

# The aesthetic score on LAION's scale that aMUSEd conditions on (Patil et al. 2024).
AESTHETIC_SCORE = 6.0


class TextToImage(ImageModality):
    """Images conditioned on an encoded text; see `text_to_image`.

    `folders` are the modules of the published directory beside the denoiser's, which lies in
    `denoiser_folder`; `files` the other files in it, by folder and name.
    """

    name = "text_to_image"
    denoiser_folder = "transformer"

    def __init__(
        self, codec: PublishedCodec, *, size: tuple[int, int], encoder: TextEncoder,
        files: Mapping[str, Mapping[str, bytes]],
    ) -> None:  # fmt: skip
        super().__init__(codec, size=size)
        self.vqvae, self.encoder, self.files = codec, encoder, files

    @property
    def takes(self) -> tuple[str, ...]:
        """The keys of a prompt."""
        return ("image", "caption")

    @property
    def folders(self) -> dict[str, nn.Module]:
        """The modules beside the denoiser, by folder."""
        return {"vqvae": self.vqvae.published, "text_encoder": self.encoder.model}

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """The condition of the empty text."""
        return self.encode_condition("")

    def encode_condition(self, text: str) -> dict[str, Tensor]:
        """The condition of a text, each tensor (1, ...).

        The micro-conditions are the width, the height, the crop's corner (0, 0) and
        `AESTHETIC_SCORE`.
        """
        height, width = self.size
        numbers = torch.tensor(
            [[width, height, 0.0, 0.0, AESTHETIC_SCORE]], dtype=torch.float32, device="cpu"
        )
        return {**self.encoder.encode(text), MICRO: numbers}

    def condition(self, prompt: object = "") -> dict[str, Tensor]:
        """The condition of a prompt's caption, or of the empty text."""
        asked = self._asked(prompt) if isinstance(prompt, str | Mapping) else {}
        caption = str(asked.get("caption", ""))
        made = self.encode_condition(caption)
        self.encoder.warn_of_cuts([caption])
        return {name: tensor[0] for name, tensor in made.items()}

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The image's positions, with what a prompt gives of it; a caption is in none of them."""
        asked = self._asked(prompt)
        return super().canvas({k: v for k, v in asked.items() if k != "caption"}, length)

    def _rows(
        self, codes: Tensor, labels: Tensor | None, captions: Sequence[str], *, slice_sha256: str
    ) -> PictureRows:
        plain = super()._rows(codes, labels, captions, slice_sha256=slice_sha256)
        self.encoder.warn_of_cuts(captions)
        return CaptionedRows(plain, self, captions or [""] * len(plain))

    def config(self) -> dict[str, object]:
        """What it is made of."""
        width = self.encoder.model.config.hidden_size
        encoder = {
            "name": type(self.encoder.model).__name__, "positions": self.encoder.length,
            "width": width,
        }  # fmt: skip
        return {
            "name": self.name, "codec": self.codec.config(), "size": list(self.size),
            "encoder": encoder,
        }  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write every part of the directory but the denoiser's."""
        self.vqvae.save_pretrained(Path(folder) / "vqvae")
        self.encoder.save(Path(folder) / "text_encoder", Path(folder) / "tokenizer")
        for part, files in self.files.items():
            write_files(Path(folder) / part, files)


class CaptionedRows(PictureRows):
    """Rows whose captions are encoded as their batch is asked for: their vectors are large."""

    def __init__(self, plain: PictureRows, modality: TextToImage, captions: Sequence[str]) -> None:
        super().__init__(
            plain.tokens.long(), cond={}, unit=plain.unit, units=plain.units,
            slice_sha256=plain.slice_sha256,
        )  # fmt: skip
        self.modality, self.captions = modality, list(captions)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 with the condition of each."""
        plain = super().batch(rows, epoch)
        # Not by `condition`, which says what is cut: that was said of all captions at once.
        made = [self.modality.encode_condition(self.captions[row]) for row in rows.tolist()]
        cond = {name: torch.cat([one[name] for one in made]) for name in made[0]}
        return Batch(plain.tokens, cond=cond)


def text_to_image(
    *, codec: PublishedCodec, size: Sequence[int], encoder: TextEncoder,
    files: Mapping[str, Mapping[str, bytes]],
) -> TextToImage:  # fmt: skip
    """The modality of a codec's images, `size` (H, W) pixels, conditioned on encoded texts.

    It is made by the loader of a published directory, not by name from a recipe. Raises
    ConfigError for a size that is no multiple of the codec's stride.
    """
    height, width = size
    if height % codec.stride or width % codec.stride:
        raise ConfigError(
            f"size={height} x {width}: expected multiples of the codec's {codec.stride} pixels"
        )
    return TextToImage(codec, size=(height, width), encoder=encoder, files=files)
