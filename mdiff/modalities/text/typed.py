"""What somebody typed into a prompt, a chat or a template: no mask, no special tokens."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mdiff.errors import ConfigError, DataError
from mdiff.modalities.text.pretrained import Pretrained
from mdiff.modalities.text.tables import checked_text
from mdiff.modalities.text.template import HOLE
from mdiff.modalities.text.tokenizers import Tokenizer

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
