"""What somebody typed into a prompt, a chat or a template: no mask, no special tokens.

In texts with gaps [MASK] is one token to fill in, [MASK:8] are eight.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mdiff.errors import ConfigError, DataError
from mdiff.modalities.text.pretrained import Pretrained
from mdiff.modalities.text.tables import checked_text
from mdiff.modalities.text.tokenizers import Tokenizer

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")
HOLE_LIMIT = 1_000_000
NOT_TEXT = "which is not text; to fill in gaps use infill, with [MASK:8]"


class Typed(NamedTuple):
    """How typed text becomes ids: `encode`, with checks of what it may not hold.

    Typed special tokens would steer the model as those of a chat template do: without
    `reads_special` they are refused.
    """

    encode: Callable[[str], list[int]]
    tokenizer: Tokenizer
    mask_id: int
    reads_special: bool = False

    def ids(self, text: str, origin: str = "the template") -> list[int]:
        """The ids of a text; DataError for a mask, ConfigError for a special token in it."""
        ids = self.encode(text)
        if self.mask_id in ids:
            raise DataError(f"{origin} holds the mask token, {NOT_TEXT}")
        token = None if self.reads_special else self.tokenizer.special_in(ids)
        if token is not None:
            raise ConfigError(
                f"{origin} holds the special token {token!r}, which steers the model; where that "
                "is meant, load it with special_tokens='typed' (--special-tokens typed)"
            )
        return ids

    def prompt(self, prompt: object) -> list[int]:
        """The ids of a text without gaps, or of {"chat": a text or messages}; see `chat`."""
        if isinstance(prompt, Mapping):
            return self.chat(prompt)
        text = checked_text(prompt)
        ids = self.ids(text, "the prompt")
        if hole := HOLE.search(text):
            raise DataError(f"the prompt holds {hole[0]}, {NOT_TEXT}")
        return ids

    def chat(self, prompt: Mapping[str, object]) -> list[int]:
        """The ids of a chat by the tokenizer's template."""
        said = prompt.get("chat")
        if set(prompt) != {"chat"} or not isinstance(said, str | list):
            raise DataError(f'{dict(prompt)!r}: expected {{"chat": a text or a list of messages}}')
        if not isinstance(self.tokenizer, Pretrained):
            raise DataError("this tokenizer has no chat template: give a plain prompt instead")
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        for number, message in enumerate(messages, start=1):
            for written in _texts(message):
                self.ids(written, f"message {number} of the chat")
        ids = self.tokenizer.chat(messages)
        if self.mask_id in ids:
            raise DataError(f"the chat template puts the mask token, {NOT_TEXT}")
        return ids


def _texts(value: object) -> Iterator[str]:
    """Every text in a message, however deep, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.items()))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


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
