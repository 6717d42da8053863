"""What generators of other projects over a fixed grid share: the class, and who sees whom."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.backbones.layers.backbone import KeyValues
from mdiff.backbones.layers.transformer import attention_layout
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
    """The class of each row (B,) int64: cond["label"], or `classes`, which says none.

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
    tokens: Tensor, *, valid: Tensor | None, documents: Tensor | None, cache: KeyValues | None,
    window: int, extra: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Each place's position (1 or B, L) and who sees whom (B, 1, L + extra, L + extra) or None.

    `extra` places that are no tokens follow the canvas and are seen by all. Raises ConfigError
    for a canvas longer than `window`, and for packed documents, which these places would mix.
    """
    if documents is not None or cache is not None:
        raise ConfigError("packed documents and caches: this model attends to a whole grid")
    if valid is None and tokens.shape[1] > window:
        raise ConfigError(f"a canvas of {tokens.shape[1]} places: this model's grid has {window}")
    positions, sees = attention_layout(tokens, valid=valid, documents=None, causal=False)
    if sees is None or valid is None:
        return positions, None
    # What follows the canvas sees its valid places, as these see it.
    below = valid[:, None, None, :].expand(-1, 1, extra, -1)
    return positions, F.pad(torch.cat([sees, below], 2), (0, extra), value=True)
