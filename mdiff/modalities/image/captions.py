"""Captions as a part of a canvas: byte pairs in a fixed number of positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mdiff.errors import ConfigError, DataError, nearest, warn
from mdiff.modalities.text.tokenizers import BytePairs

FOLDER = "captions"
DEFAULTS = {"length": 16, "vocab_size": 512}


def check_unicode(text: str) -> None:
    """Raise DataError for half of a surrogate pair, as bytes that are not UTF-8 give."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{text!r:.60}: character {error.start} is not valid Unicode") from None


def warn_of_cuts(lengths: Iterable[int], most: int) -> None:
    """Say how many captions have more than `most` tokens and are cut; nothing where none has."""
    count = sum(length > most for length in lengths)
    if count:
        warn(f"{count} {'caption is' if count == 1 else 'captions are'} cut at {most} tokens")


class Captions:
    """Captions to `length` ids below `size` and back; the last id ends one and fills the rest.

    The byte pairs are learnt once, by `learn`, and read back from where `save` wrote.
    """

    def __init__(self, length: int, vocab_size: int, words: BytePairs | None = None) -> None:
        self.length, self.vocab_size, self._words = length, vocab_size, words

    @classmethod
    def of(cls, options: Mapping[str, object], folder: str | Path | None) -> Captions:
        """From the modality's options, with what was learnt if it lies in `folder`.

        Raises ConfigError for invalid options.
        """
        chosen = dict(DEFAULTS)
        for key, value in options.items():
            if key not in DEFAULTS:
                raise ConfigError(f"unknown key modality.caption.{key}; {nearest(key, DEFAULTS)}")
            if type(value) is not int or value < 1:
                raise ConfigError(f"modality.caption.{key}={value!r}: expected a whole number")
            chosen[key] = value
        stored = None if folder is None else Path(folder) / FOLDER
        words = BytePairs.read(stored) if stored is not None and stored.is_dir() else None
        return cls(**chosen, words=words)

    @property
    def words(self) -> BytePairs:
        """The byte pairs; ConfigError where they are not learnt yet."""
        if self._words is None:
            raise ConfigError("the captions' tokenizer is not trained yet: give it data first")
        return self._words

    @property
    def learnt(self) -> bool:
        """Whether the byte pairs are known."""
        return self._words is not None

    @property
    def size(self) -> int:
        """How many ids there are, the end included."""
        return self.words.size + 1

    def learn(self, captions: Sequence[str]) -> None:
        """Learn the byte pairs of these captions, unless that is done."""
        if not self.learnt:
            self._words = BytePairs.learn(captions, size=self.vocab_size)

    def encode(self, caption: str, *, cut: bool = False) -> list[int]:
        """The caption's `length` ids; one that is too long is cut, or else a DataError."""
        ids = self.words.encode(caption)
        if len(ids) > self.length and not cut:
            raise DataError(
                f"the caption {caption!r} takes {len(ids)} tokens, at most {self.length} fit"
            )
        return ids[: self.length] + [self.words.size] * (self.length - len(ids))

    def decode(self, ids: Sequence[int | None]) -> str:
        """The caption up to its end; masked positions, None, are left out."""
        end = self.words.size
        stop = list(ids).index(end) if end in ids else len(ids)
        return self.words.decode([token for token in ids[:stop] if token is not None])

    def config(self) -> dict[str, int]:
        """The options that `of` takes back."""
        return {"length": self.length, "vocab_size": self.vocab_size}

    def save(self, folder: Path) -> None:
        """Write what was learnt into `folder`/captions."""
        (folder / FOLDER).mkdir()
        self.words.save(folder / FOLDER)
