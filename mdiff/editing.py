"""Editing: which tokens a change of pixels touches, and the pixels that stay as they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.codec import Codec
from mdiff.errors import ConfigError, DataError

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
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def touched(codec: Codec, mask: Tensor) -> Tensor:
    """The places (h, w) bool whose encoder reads a pixel of `mask` (H, W) bool.

    A token reads its own patch and `reach` pixels beyond it, each way.
    """
    if codec.reach is None:
        height, width = mask.shape
        shape = height // codec.stride, width // codec.stride
        return mask.any().expand(shape).clone()
    padded = F.pad(mask[None, None].float(), (codec.reach,) * 4)
    seen = F.max_pool2d(padded, codec.stride + 2 * codec.reach, stride=codec.stride)
    return seen[0, 0] > 0


def pasted(original: Tensor, made: Tensor, mask: Tensor) -> Tensor:
    """`made` (B, C, H, W) inside the mask (H, W), the original (C, H, W) outside, exactly."""
    return torch.where(mask, made, original)


def shown_pictures(codec: Codec, places: Tensor, *, mask_id: int) -> Tensor:
    """The pictures (B, C, H, W) uint8 of codes (B, h, w, splits), grey where one is hidden."""
    hidden = places == mask_id
    ids = torch.where(hidden, 0, places)
    made = codec.decode(ids[..., 0] if codec.splits == 1 else ids)
    cover = hidden.any(3).repeat_interleave(codec.stride, 1).repeat_interleave(codec.stride, 2)
    return made.masked_fill(cover[:, None], GREY)
