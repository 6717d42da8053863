"""Canvases of different lengths stacked into one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.tokens import TokenSpace


def continued(given: Sequence[int], length: int | None, *, mask_id: int) -> list[int]:
    """The given tokens followed by masks, `length` places in all (None: no masks).

    Raises ConfigError for a length below 1 and DataError where the tokens hold the mask or do
    not fit the canvas.

    >>> continued([3, 1], 4, mask_id=5)
    [3, 1, 5, 5]
    """
    if length is None:
        length = len(given)
    if length < 1:
        raise ConfigError(f"length={length}: need at least 1")
    if mask_id in given:
        raise DataError(f"the given tokens hold the mask id {mask_id}")
    if len(given) > length:
        raise DataError(
            f"{len(given)} given tokens do not fit a canvas of {length}; "
            f"raise the length to more than {len(given)}"
        )
    return [*given, *[mask_id] * (length - len(given))]


def stack(rows: Sequence[Sequence[int]], *, space: TokenSpace) -> tuple[Tensor, Tensor | None]:
    """Rows of any lengths as a batch: tokens (B, L) int64 and valid (B, L) bool.

    Shorter rows are padded on the right with id 0; valid is None where none is.

    >>> stack([[1], [2, 3]], space=TokenSpace(5, mask_id=5))[1].tolist()
    [[True, False], [True, True]]
    """
    if not rows or not all(len(row) for row in rows):
        raise ConfigError("an empty canvas: need at least 1 row and 1 place in each")
    sizes = torch.tensor([len(row) for row in rows])
    valid = torch.arange(int(sizes.max())) < sizes[:, None]
    tokens = torch.zeros(valid.shape, dtype=torch.int64)
    tokens[valid] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    space.check(tokens, valid)
    return tokens, None if bool(valid.all()) else valid
