"""What generators of other projects over a fixed grid share: class, positions, mask."""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.backbones.layers.attention import attention_layout
from mdiff.backbones.layers.backbone import Call
from mdiff.denoiser import Condition
from mdiff.errors import ConfigError

LABEL = "label"


@runtime_checkable
class GridModel(Protocol):
    """A generator over a grid of positions (h, w), with `classes` labels."""

    latent_grid: tuple[int, int]
    codes_per_position: int
    classes: int
    mask_id: int | None


def class_of(cond: Condition | None, tokens: Tensor, *, classes: int) -> Tensor:
    """The class of each row (B,) int64: cond["label"], or `classes`, the null label.

    Raises ConfigError for a condition of another name or shape.
    """
    for name in cond or {}:
        if name != LABEL:
            raise ConfigError(f"condition {name!r}: this model takes {LABEL!r} alone")
    if not cond:
        return torch.full_like(tokens[:, 0], classes)
    label = cond[LABEL]
    if label.shape != tokens.shape[:1] or label.dtype != torch.int64:
        raise ConfigError(
            f"condition {LABEL!r} {tuple(label.shape)} {label.dtype}: expected "
            f"({tokens.shape[0]},) int64"
        )
    return label


def grid_layout(
    tokens: Tensor, call: Call, *, window: int, extra: int
) -> tuple[Tensor, Tensor | None]:
    """The positions (1 or B, L) and the attention mask (B, 1, L + extra, L + extra) or None.

    `extra` positions that are no tokens follow the canvas; all attend to them. Raises ConfigError
    for a canvas longer than `window`, and for packed documents, which these would mix.
    """
    if call.documents is not None or call.cache is not None:
        raise ConfigError("packed documents and caches: this model attends to a whole grid")
    valid, length = call.valid, tokens.shape[1]
    if valid is None and length > window:
        raise ConfigError(f"a canvas of {length} positions: this model's grid has {window}")
    positions, mask = attention_layout(tokens, valid=valid, documents=None, causal=False)
    if mask is None or valid is None:
        return positions, None
    # What follows the canvas attends to its valid positions, as these do to it.
    below = valid[:, None, None, :].expand(-1, 1, extra, -1)
    return positions, F.pad(torch.cat([mask, below], 2), (0, extra), value=True)
