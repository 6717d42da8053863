"""What somebody typed into a prompt, a chat or a template: no mask, no special tokens.

In texts with gaps [MASK] is one token to fill in, [MASK:8] are eight.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mdiff.errors import ConfigError, DataError, nearest, warn
from mdiff.modalities.protocol import Modality
from mdiff.modalities.text.pretrained import NO_TEMPLATE, Pretrained
from mdiff.modalities.text.tables import checked_text
from mdiff.modalities.text.tokenizers import Tokenizer

HOLE = re.compile(r"\[MASK(?::(\d+))?\]")
HOLE_LIMIT = 1_000_000
NOT_TEXT = "which is not text; to fill in gaps use infill, with [MASK:8]"
# Who may have said a message, and what a template takes beside the messages.
ROLES = ("assistant", "developer", "system", "tool", "user")
BESIDE = ("tools", "documents")
STAYING = ("developer", "system")
DROPPING = "shorten it, or leave out its oldest turns by drop_oldest (--drop-oldest)"


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
        """The ids of a chat by the tokenizer's template, with its "tools" and "documents"."""
        said = prompt.get("chat")
        beside = {name: value for name, value in prompt.items() if name != "chat"}
        if not isinstance(said, str | list) or not set(beside) <= set(BESIDE):
            raise DataError(
                f'{dict(prompt)!r:.200}: expected {{"chat": a text or a list of messages}}, and if '
                f"wanted {' and '.join(BESIDE)}"
            )
        if not isinstance(self.tokenizer, Pretrained):
            raise DataError(NO_TEMPLATE)
        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        if not messages:
            raise DataError("the chat is empty: expected a text or at least one message")
        for number, message in enumerate(messages, start=1):
            for written in _texts(message):
                self.ids(written, f"message {number} of the chat")
            _check_message(message, f"message {number} of the chat")
        for name, value in beside.items():
            if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
                raise DataError(f"{name}={value!r:.60}: expected a list of mappings")
            for written in _texts(value):
                self.ids(written, f"{name} of the chat")
        ids = self.tokenizer.chat(messages, **beside)
        if self.mask_id in ids:
            raise DataError(f"the chat template puts the mask token, {NOT_TEXT}")
        return ids


def fitting(modality: Modality, prompt: Mapping[str, object], most: int) -> dict[str, object]:
    """The prompt of a chat with at most `most` tokens; without its "drop_oldest".

    Where that is true, the oldest turns are left out until it fits; messages of the system stay.
    Raises DataError for a conversation that does not fit.
    """
    kept = dict(prompt)
    drop, number = kept.pop("drop_oldest", False), 0
    while (size := len(modality.canvas(kept))) > most:
        said = kept["chat"] if isinstance(kept["chat"], list) else []
        first = next((i for i, one in enumerate(said) if one["role"] not in STAYING), 0)
        users = [i for i, one in enumerate(said) if one["role"] == "user" and i > first]
        if drop is not True or not users:
            raise DataError(
                f"the conversation has {size} tokens, and {max(most, 0)} of the model's window are "
                "left for it: " + ("shorten it" if drop is True else DROPPING)
            )
        kept["chat"] = said[:first] + said[users[0] :]
        number += users[0] - first
    if number:
        warn(f"{number} messages, the oldest of the conversation, do not fit and are left out")
    return kept


def _check_message(message: object, origin: str) -> None:
    """Raise DataError for what is no message: a role of ROLES, and a content or calls of tools."""
    if not isinstance(message, Mapping):
        raise DataError(f"{origin} is {message!r:.60}: expected a role and a content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"{origin}: role={role!r:.60}; {nearest(str(role)[:60], ROLES)}")
    if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{origin}: content={content!r:.60}: expected a text")


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
