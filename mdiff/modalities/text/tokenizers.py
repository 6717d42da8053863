"""Text to token ids and back: bytes, characters, byte-pair encoding, or anyone's tokenizer."""

from __future__ import annotations

import codecs
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError
from mdiff.files import TRANSFORMERS, read_json, refuse_special

BYTES = 256
FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
# What ends a text or a turn of a chat, whichever of them a tokenizer calls its end.
ENDS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>")
# Classes that come as code beside a model, and those of transformers that read the same files.
SAME_AS = {"DreamTokenizer": "Qwen2Tokenizer"}


class Tokenizer(Protocol):
    """What the text modality needs of a tokenizer; ids are 0 to `size` - 1."""

    size: int
    lossless: bool

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with nothing added at either end."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id adds; joined, they are `decode`."""

    def save(self, folder: Path) -> None:
        """Write what was learned into an existing folder."""


class Bytes:
    """UTF-8 bytes: 256 ids, nothing to learn, lossless.

    >>> Bytes().encode("é")
    [195, 169]
    """

    size = BYTES
    lossless = True

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """A character appears with the last of its bytes."""
        return utf8_pieces([bytes([i]) for i in ids])

    def save(self, folder: Path) -> None:
        """Nothing to write."""


class Characters:
    """One id a character of a fixed alphabet; a character outside it is a DataError."""

    lossless = True

    def __init__(self, alphabet: str) -> None:
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise ConfigError("alphabet: expected different characters, at least one")
        self.alphabet = alphabet
        self.size = len(alphabet)
        self._id = {character: i for i, character in enumerate(alphabet)}

    @classmethod
    def learn(cls, documents: Iterable[str]) -> Characters:
        """The alphabet of the documents, in the order of code points."""
        return cls("".join(sorted(set().union(*documents))))

    def encode(self, text: str) -> list[int]:
        """One id a character."""
        try:
            return [self._id[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise DataError(
                f"{character!r} (U+{ord(character):04X}) at character {text.index(character)} is "
                f"not among the {self.size} of this alphabet; tokenizers byte and bpe take any text"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The characters."""
        return "".join(self.alphabet[i] for i in ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The characters, one by one."""
        return [self.alphabet[i] for i in ids]

    def save(self, folder: Path) -> None:
        """Nothing to write: the alphabet is in the settings."""


class BytePairs:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), lossless."""

    lossless = True

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.size: int = inner.get_vocab_size()
        table = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._bytes = [
            bytes(table[character] for character in inner.id_to_token(i)) for i in range(self.size)
        ]

    @classmethod
    def learn(cls, documents: Iterable[str], *, size: int) -> BytePairs:
        """At most `size` ids: the 256 bytes and the merges that the documents give."""
        if size < BYTES:
            raise ConfigError(f"vocab_size={size}: a byte-level bpe needs at least {BYTES} ids")
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = Inner(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner)

    @classmethod
    def read(cls, folder: Path) -> BytePairs:
        """From `tokenizer.json` in the folder; CheckpointError where it is not one of ours."""
        from tokenizers import Tokenizer as Inner

        path = folder / FILE
        refuse_special(folder)
        try:
            return cls(Inner.from_file(str(path)))
        except KeyError as error:
            raise CheckpointError(f"{path}: token {error} is not byte-level") from None
        except Exception as error:
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The ids of the merged byte pairs."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds; a character cut between ids appears with the last of them."""
        return utf8_pieces([self._bytes[i] for i in ids])

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.inner.save(str(folder / FILE))


class Pretrained:
    """Any tokenizer of the Hugging Face libraries, by path or Hub id; its code is never run.

    `mask_id`, `eos_id` and `pad_id` are its own, None where it has none; `end_ids` all that end
    a text or a turn; `never` are special ids that no text gives.
    """

    lossless = False

    def __init__(self, name: str) -> None:
        path = Path(name)
        if path.is_dir():
            refuse_special(path)
        try:
            with TRANSFORMERS:
                self.inner = self._loaded(path)
            self._read_ids()
        except Exception as error:
            kind = CheckpointError if path.exists() else BackendError
            first = str(error).strip().split("\n")[0]
            raise kind(
                f"tokenizer {name!r} cannot be loaded: {first}; "
                "known: byte, char, bpe, a path, a Hub id"
            ) from error

    @staticmethod
    def _loaded(path: Path) -> Any:
        if path.is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        with _quiet():
            return _class_of(path).from_pretrained(str(path), trust_remote_code=False)

    def _read_ids(self) -> None:
        """The ids that the tokenizer names; of a damaged one, asking for them may fail."""
        self.size = len(self.inner)
        self.mask_id: int | None = self.inner.mask_token_id
        end = self.inner.eos_token_id
        self.eos_id: int | None = self.inner.sep_token_id if end is None else end
        self.pad_id: int | None = self.inner.pad_token_id
        named = self.inner.get_added_vocab()
        ends = {named[token] for token in ENDS if token in named}
        self.end_ids = tuple(sorted(ends | ({self.eos_id} if self.eos_id is not None else set())))
        kept = {self.mask_id, self.eos_id, self.inner.unk_token_id}
        self.never = tuple(sorted(set(self.inner.all_special_ids) - kept))

    def encode(self, text: str) -> list[int]:
        """The ids, with no special tokens added."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        text: str = self.inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, said: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of what a user said, or of {"role", "content"} messages, up to the answer.

        By the tokenizer's own template, which its library renders in a sandbox. Raises DataError
        where it has none or refuses these messages.
        """
        if not self.inner.chat_template:
            raise DataError("this tokenizer has no chat template: give a plain prompt instead")
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        try:
            ids: list[int] = self.inner.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True,
                tokenize=True, return_dict=False,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        return ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text before it."""
        texts = [""] + [self.decode(ids[: i + 1]) for i in range(len(ids))]
        return [after[len(before) :] for before, after in pairwise(texts)]

    def save(self, folder: Path) -> None:
        """Write its own files."""
        self.inner.save_pretrained(str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings on configs of models that it does not know."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


def _class_of(folder: Path) -> Any:
    """The class of transformers that reads the tokenizer in `folder`."""
    import transformers

    settings = folder / SETTINGS
    named = read_json(settings).get("tokenizer_class") if settings.exists() else None
    return getattr(transformers, SAME_AS.get(str(named), "AutoTokenizer"))


def utf8_pieces(parts: Sequence[bytes]) -> list[str]:
    """The text that each run of bytes completes; joined, the text of them all."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    pieces = [decoder.decode(part) for part in parts]
    if pieces:
        pieces[-1] += decoder.decode(b"", final=True)
    return pieces


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(spare)) for byte in range(BYTES)]
