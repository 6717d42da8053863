"""Text to token ids and back: bytes, characters or byte-pair encoding."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import refuse_special

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Inner

BYTES = 256
FILE = "tokenizer.json"
# The kinds that are made here, by their names.
OWN = ("byte", "char", "bpe")
# So many ids without a text of their own are tried at each, longer runs at powers of two alone.
FEW = 8


class Tokenizer(Protocol):
    """What the text modality needs of a tokenizer; ids are 0 to `size` - 1.

    `mask_id`, `eos_id` and `pad_id` are its own special ids, None where it has none; `end_ids` all
    that end a text or a turn of a chat; `never` are special ids that no text gives. `continues`
    says that a text or ids stand inside a text, behind something: what a tokenizer adds or leaves
    out at the start of a text is then neither added nor left out. The defaults are those of a
    tokenizer without special ids.
    """

    size: int
    lossless: bool = True
    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    end_ids: tuple[int, ...] = ()
    never: tuple[int, ...] = ()

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids of a text, with nothing added at either end."""

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """The text of ids."""

    def pieces(self, ids: Sequence[int], *, continues: bool = False) -> list[str]:
        """The text that each id adds; joined, they are `decode`."""

    def special_in(self, ids: Sequence[int]) -> str | None:
        """The first special token among the ids, by its text; None without one."""
        return None

    def no_text(self, columns: int, *, special: bool = True) -> set[int]:
        """The ids below `columns` that it does not have and, with `special`, its special ones.

        Ids that end a text are not among them: a model draws one to end.
        """
        return set(range(self.size, columns))

    def save(self, folder: Path) -> None:
        """Write what was learned into an existing folder; by default nothing."""
        return None


class Bytes(Tokenizer):
    """UTF-8 bytes: 256 ids, nothing to learn, lossless.

    >>> Bytes().encode("é")
    [195, 169]
    """

    size = BYTES

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int], *, continues: bool = False) -> list[str]:
        """A character appears with the last of its bytes."""
        return utf8_pieces([bytes([i]) for i in ids])


class Characters(Tokenizer):
    """One id a character of a fixed alphabet, which the settings hold; DataError for another."""

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

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        try:
            return [self._id[character] for character in text]
        except KeyError as error:
            character = error.args[0]
            raise DataError(
                f"{character!r} (U+{ord(character):04X}) at character {text.index(character)} is "
                f"not among the {self.size} of this alphabet; tokenizers byte and bpe take any text"
            ) from None

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        return "".join(self.alphabet[i] for i in ids)

    def pieces(self, ids: Sequence[int], *, continues: bool = False) -> list[str]:
        return [self.alphabet[i] for i in ids]


class BytePairs(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019), lossless."""

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.size: int = inner.get_vocab_size()
        table = {character: byte for byte, character in enumerate(byte_alphabet())}
        token = {i: text for text, i in inner.get_vocab().items()}
        self._bytes = [bytes(table[character] for character in token[i]) for i in range(self.size)]

    @classmethod
    def learn(cls, documents: Iterable[str], *, size: int) -> BytePairs:
        """At most `size` ids: the 256 bytes and the merges that the documents give."""
        if size < BYTES:
            raise ConfigError(f"vocab_size={size}: a byte-level bpe needs at least {BYTES} ids")
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, show_progress=False
        )
        inner.train_from_iterator(documents, trainer)
        return cls(inner)

    @classmethod
    def read(cls, folder: Path) -> BytePairs:
        """From `tokenizer.json` in the folder; CheckpointError where it is not one of ours."""
        from tokenizers import Tokenizer

        path = folder / FILE
        refuse_special(folder)
        try:
            return cls(Tokenizer.from_file(str(path)))
        except KeyError as error:
            raise CheckpointError(f"{path}: token {error} is not byte-level") from None
        except Exception as error:
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        ids: list[int] = self.inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def pieces(self, ids: Sequence[int], *, continues: bool = False) -> list[str]:
        """What each id adds; a character cut between ids appears with the last of them."""
        return utf8_pieces([self._bytes[i] for i in ids])

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self.inner.save(str(folder / FILE))


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printable else next(spare)) for byte in range(BYTES)]


def text_pieces(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], *, behind: Sequence[int] = ()
) -> list[str]:
    """The text that each id adds behind the ids `behind`; joined, `decoded(decode, ids)`.

    A character cut between ids appears with the last of them. Every part is compared with the
    whole text: where decoding a stretch alone gives another text, the ids wait for later ones.
    The ids that are decoded are at most a constant times those given.

    >>> text_pieces(lambda ids: bytes(ids).decode(errors="replace"), [195, 169, 97])
    ['', 'é', 'a']
    """
    found = [""] * len(ids)
    if not ids:
        return found
    whole, row = decoded(decode, ids, behind=behind), [*behind, *ids]
    # The text of row[context:read] is `known`; `at` characters of the whole text have an id.
    context, read, at, known = 0, len(behind), 0, decode(behind)
    for end in range(read + 1, len(row) + 1):
        waiting = end - read
        if waiting > FEW and waiting & (waiting - 1):
            continue
        text = decode(row[context:end])
        new = text[len(known) :]
        if new and text.startswith(known) and whole.startswith(new, at):
            found[end - 1 - len(behind)] = new
            context, read, at = read, end, at + len(new)
            known = decode(row[context:read])
    found[-1] += whole[at:]
    return found


def decoded(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], *, behind: Sequence[int] = ()
) -> str:
    """The text of ids that stand behind others, whose own text is left out.

    Decoders drop a space at the start of a text, and some join words with one: what is inside
    a text is decoded behind something.
    """
    before, text = decode(behind), decode([*behind, *ids])
    return text[len(before) :] if text.startswith(before) else decode(ids)


def utf8_pieces(parts: Sequence[bytes]) -> list[str]:
    """The text that each run of bytes completes; joined, the text of them all."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(part, final=i == len(parts)) for i, part in enumerate(parts, start=1)]
