"""Texts with gaps: [MASK] is one token to fill in, [MASK:8] eight."""

import re
from collections.abc import Callable

from mdiff.errors import ConfigError, DataError

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")
HOLE_LIMIT = 1_000_000


def template_canvas(
    text: str,
    encode: Callable[[str], list[int]],
    *,
    continued: Callable[[str], list[int]] | None = None,
    mask_id: int,
) -> list[int]:
    """The canvas of a text with gaps; what stands around them is kept exactly, spaces included.

    `continued` encodes what comes behind a gap, by default as `encode` does.

    Raises DataError for a text without gaps or with another mask, ConfigError for a gap of no
    tokens or of more than HOLE_LIMIT.

    >>> template_canvas("a[MASK:2]b", lambda text: list(text.encode()), mask_id=256)
    [97, 256, 256, 98]
    """

    def given(piece: str) -> list[int]:
        ids = (continued if continued is not None and holes else encode)(piece)
        if "[MASK" in piece or mask_id in ids:
            raise DataError(f"{piece!r} holds a mask; write gaps as [MASK] or [MASK:8]")
        return ids

    canvas: list[int] = []
    end, holes = 0, 0
    for hole in HOLE.finditer(text):
        count = int(hole[1] or 1)
        if not 1 <= count <= HOLE_LIMIT:
            raise ConfigError(f"{hole[0]}: expected 1 to {HOLE_LIMIT} tokens")
        canvas += given(text[end : hole.start()]) + [mask_id] * count
        end, holes = hole.end(), holes + 1
    if not holes:
        raise DataError("nothing to fill in: write [MASK:8] where 8 tokens are to appear")
    return canvas + given(text[end:])
