"""Inpainting: the tokens that a change of pixels touches, and the pixels that stay unchanged."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.kernels import philox
from mdiff.modalities.image.codec import Codec
from mdiff.modalities.image.data.pixels import plain_array

GREY = 200


def box_mask(box: str, size: tuple[int, int]) -> Tensor:
    """The pixels (H, W) bool of "ROWS,COLUMNS", each FIRST:STOP, half-open as in Python.

    Raises ConfigError where it is not so written, DataError where it leaves the picture.

    >>> int(box_mask("1:3,0:2", (4, 4)).sum())
    4
    """
    try:
        (top, bottom), (left, right) = (
            (int(part) for part in side.split(":")) for side in box.split(",")
        )
    except ValueError:
        raise ConfigError(f"mask {box[:60]!r}: expected ROWS,COLUMNS such as 8:24,8:24") from None
    height, width = size
    if not (0 <= top < bottom <= height and 0 <= left < right <= width):
        raise DataError(
            f"mask {box}: expected a box inside {height} rows and {width} columns, not empty"
        )
    mask = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    mask[top:bottom, left:right] = True
    return mask


def pixel_mask(mask: object, size: tuple[int, int]) -> Tensor:
    """The pixels (H, W) bool to regenerate: all for None, a box by its text, or as given.

    Raises DataError for a mask of another shape or type, or one that is empty.
    """
    if mask is None:
        return torch.ones(size, dtype=torch.bool, device="cpu")
    if isinstance(mask, str):
        return box_mask(mask, size)
    found = plain_array(mask, "the mask")
    if found.shape != tuple(size) or found.dtype != np.bool_:
        raise DataError(f"mask {found.shape} {found.dtype}: expected {tuple(size)} bool")
    if not found.any():
        raise DataError("the mask is empty: there is nothing to regenerate")
    return torch.from_numpy(found.copy())


def hidden_share(may: Tensor, *, strength: float, seeds: Tensor) -> Tensor:
    """Which of the n positions `may` (L,) bool to hide, (N, L): exactly round(strength n) of them.

    They are chosen uniformly by each sample's own seed (N,) int64. Raises ConfigError for a
    strength outside [0, 1].
    """
    if isinstance(strength, bool) or not 0 <= strength <= 1:
        raise ConfigError(f"strength={strength}: expected 0 to 1")
    position = torch.arange(len(may), device=may.device)
    coin = philox.uniform(seeds[:, None], position, 0, 0, purpose=philox.CORRUPT)
    order = torch.where(may, coin, 2.0).argsort(dim=1, stable=True).argsort(dim=1)
    return order < round(strength * int(may.sum()))


def as_picture(pixels: Tensor) -> Image.Image:
    """A picture (C, H, W) uint8 for people."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


@dataclass(frozen=True)
class Edits:
    """Versions of a picture (C, H, W) uint8 to be generated, a canvas each.

    `mask` (H, W) bool is true where a pixel may change, None where all may.
    """

    canvases: list[list[int]]
    original: Tensor
    mask: Tensor | None

    def pasted(self, made: Image.Image) -> Image.Image:
        """`made` with the original pixels outside the mask, bit for bit; `info` is kept."""
        if self.mask is None:
            return made
        array = torch.from_numpy(np.array(made))
        array = array[None] if array.dim() == 2 else array.permute(2, 0, 1)
        found = as_picture(pasted(self.original, array, self.mask))
        found.info.update(made.info)
        return found


def touched(codec: Codec, mask: Tensor) -> Tensor:
    """The positions (h, w) bool for which the encoder reads a pixel of `mask` (H, W) bool.

    That is the position's own patch and the codec's `receptive_field_margin` around it. Where the
    encoder reads the whole picture it is the own patch alone, as in the published inpainting
    pipelines: with all positions hidden, nothing of the surroundings would be given.
    """
    margin = codec.receptive_field_margin or 0
    padded = F.pad(mask[None, None].float(), (margin,) * 4)
    read = F.max_pool2d(padded, codec.stride + 2 * margin, stride=codec.stride)
    return read[0, 0] > 0


def pasted(original: Tensor, made: Tensor, mask: Tensor) -> Tensor:
    """`made` (B, C, H, W) inside the mask (H, W), the original (C, H, W) outside, exactly."""
    return torch.where(mask, made, original)


def shown_pictures(codec: Codec, codes: Tensor, *, mask_id: int) -> Tensor:
    """The pictures (B, C, H, W) uint8 of codes (B, h, w, n), grey where one is hidden."""
    hidden = codes == mask_id
    ids = torch.where(hidden, 0, codes)
    made = codec.decode(ids[..., 0] if codec.codes_per_position == 1 else ids)
    cover = hidden.any(3).repeat_interleave(codec.stride, 1).repeat_interleave(codec.stride, 2)
    return made.masked_fill(cover[:, None], GREY)
