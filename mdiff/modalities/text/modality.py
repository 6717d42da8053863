"""Text: a tokenizer, the canvases that prompts and templates make, and rows for training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import read_json
from mdiff.modalities.text.documents import Source, cut_documents, digest
from mdiff.modalities.text.packing import PackedRows
from mdiff.modalities.text.pretrained import Pretrained, path_or_id
from mdiff.modalities.text.source import DataSource
from mdiff.modalities.text.tables import checked_text
from mdiff.modalities.text.tokenizers import OWN, BytePairs, Bytes, Characters, Tokenizer
from mdiff.modalities.text.typed import Typed, template_canvas
from mdiff.tokens import TokenSpace, check_documents, continued

SETTINGS = "modality.json"
BPE_SIZE = 512


class Text:
    """Text to tokens and back; see `text`.

    `unit` is "byte", of UTF-8. `space` is known once the tokenizer is: at once for "byte" and
    anyone's tokenizer, after the first `examples` (or `fit`) for "char" and "bpe".
    """

    name, unit = "text", "byte"

    def __init__(
        self, kind: str, *, vocab_size: int | None, eos: bool, mask_id: int | None,
        tokenizer: Tokenizer | None,
    ) -> None:  # fmt: skip
        self.kind, self.vocab_size, self.eos = kind, vocab_size, eos
        self._mask_id, self._tokenizer = mask_id, tokenizer
        # Whether special tokens that are typed in prompts, chats and templates are read as such.
        self.reads_special = False
        # What a model's own files name as ends beside the tokenizer's.
        self.stated_ends: tuple[int, ...] = ()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; ConfigError where it has not been trained."""
        if self._tokenizer is None:
            raise ConfigError(f"the {self.kind} tokenizer is not trained yet: give it data first")
        return self._tokenizer

    @property
    def space(self) -> TokenSpace:
        """Ids of text, then the end of text if there is one; the mask is `mask_id`."""
        inner = self.tokenizer
        return TokenSpace(inner.size + self.eos, mask_id=self.mask_id, never=inner.never)

    @property
    def mask_id(self) -> int:
        """The id that hides a token: as given, else the tokenizer's, else the next free one."""
        if self._mask_id is not None:
            return self._mask_id
        own = self.tokenizer.mask_id
        return self.tokenizer.size + self.eos if own is None else own

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, or None."""
        return self.tokenizer.size if self.eos else self.tokenizer.eos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a document or, in a chat, a turn."""
        inner = self.tokenizer
        turn = inner.turn_end if isinstance(inner, Pretrained) else []
        own = (inner.size,) if self.eos else inner.end_ids
        return tuple(sorted({*own, *turn, *self.stated_ends}))

    @property
    def pad_id(self) -> int | None:
        """The tokenizer's own padding id, or None; canvases are padded by `valid` instead."""
        return self.tokenizer.pad_id

    def no_text(self, columns: int, *, special: bool = True) -> set[int]:
        """The ids below `columns` that are no text and end none; see `Tokenizer.no_text`."""
        return self.tokenizer.no_text(columns, special=special) - {
            self.mask_id, self.eos_id, *self.stated_ends,
        }  # fmt: skip

    def encode(self, text: object, *, continues: bool = False) -> list[int]:
        """The ids of a text, with nothing added; DataError where it is not valid Unicode.

        One that `continues` stands inside a text: no space is put before it.
        """
        return self.tokenizer.encode(checked_text(text), continues=continues)

    def decode(self, ids: Sequence[int], *, whole: bool = False) -> str:
        """The text up to the first end of text, or the `whole` of it; masks are left out.

        A gap ends a run of bytes: those on its two sides are never one character.
        """
        decode, runs = self.tokenizer.decode, self._runs(ids, whole)
        return "".join(decode(run, continues=first > 0) for first, run in runs)

    def pieces(self, ids: Sequence[int], *, whole: bool = False) -> list[str | None]:
        """The text of each position, None where it is masked; joined, `decode`.

        After the end of text "", unless the `whole` is asked for.
        """
        mask = self.mask_id
        found: list[str | None] = [None if token == mask else "" for token in ids]
        for first, run in self._runs(ids, whole):
            found[first : first + len(run)] = self.tokenizer.pieces(run, continues=first > 0)
        return found

    def _runs(self, ids: Sequence[int], whole: bool) -> Iterator[tuple[int, list[int]]]:
        """The ids between masks and ends of our own, after the position of their first.

        Without `whole` those up to the first end of text.
        """
        eos, first = self.eos_id, 0
        gaps = {self.mask_id, *((eos,) if self.kind in OWN else ())}
        shown = ids if whole or eos is None else takewhile(lambda token: token != eos, ids)
        for is_gap, group in groupby(shown, key=gaps.__contains__):
            run = list(group)
            if not is_gap:
                yield first, run
            first += len(run)

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The prompt's tokens followed by masks, `length` positions in all.

        A prompt {"chat": ...} is what a user says, or a list of {"role", "content"} messages,
        put as the tokenizer's chat template puts it, with lists of "tools" and "documents" where
        they are given. Raises DataError where the prompt holds a mask or does not fit, and where
        there is no template; ConfigError where it holds a special token, unless `reads_special`.
        """
        given = self._typed(self.encode).prompt(prompt)
        return continued(given, length, mask_id=self.mask_id)

    def template(self, text: str) -> list[int]:
        """The canvas of a text with gaps; see `template_canvas`."""
        first, behind = self.encode, partial(self.encode, continues=True)
        return template_canvas(
            text, self._typed(first).ids, continued=self._typed(behind).ids, mask_id=self.mask_id
        )

    def _typed(self, encode: Callable[[str], list[int]]) -> Typed:
        return Typed(encode, self.tokenizer, self.mask_id, self.reads_special)

    def fit(self, documents: Sequence[str]) -> Text:
        """Train the tokenizer on these documents if it needs it and has not been."""
        if self._tokenizer is None and self.kind == "char":
            self._tokenizer = Characters.learn(documents)
        elif self._tokenizer is None:
            size = (self.vocab_size or BPE_SIZE) - self.eos
            self._tokenizer = BytePairs.learn(documents, size=size)
        return self

    def examples(
        self, data: Mapping[str, object] | Source | str, *, length: int | None, split: str = "train"
    ) -> PackedRows:
        """Rows of `length` tokens of a split: "train", "validation" or "holdout".

        The tokenizer is trained first where it has not been, on the training split only.
        Training rows shift between epochs; the others lie side by side and are padded.
        """
        if length is None:
            raise ConfigError("data.length is missing: how many tokens a row of text has")
        source = Source.of(data)
        everything = self.documents(source)
        shares = {"holdout": source.holdout, "validation": source.validation}
        if self._tokenizer is None:
            self.fit(cut_documents(everything, "train", **shares))
        documents = cut_documents(everything, split, **shares)
        end = [] if self.eos_id is None else [self.eos_id]
        rows = [self.encode(document) + end for document in documents]
        check_documents(rows, self.space, name=f"{split} document")
        return PackedRows(
            rows, length=length, shift=split == "train", unit=self.unit,
            units=self.sizes(documents)["byte"] / max(1, sum(map(len, rows))),
            slice_sha256=digest(documents),
        )  # fmt: skip

    def documents(self, data: Mapping[str, object] | DataSource | str) -> list[str]:
        """The documents of a data section; DataError with file and line where one is no text."""
        return Source.of(data).documents()

    def sizes(self, texts: Sequence[str]) -> dict[str, int]:
        """How many characters and UTF-8 bytes the texts have, for figures by each."""
        return {"char": sum(map(len, texts)), "byte": sum(len(text.encode()) for text in texts)}

    def config(self) -> dict[str, object]:
        """The settings that `text(**settings, folder=...)` takes back, with the name."""
        settings: dict[str, object] = {"name": self.name, "tokenizer": self.kind}
        if self._mask_id is not None:
            settings["mask_id"] = self._mask_id
        if isinstance(self._tokenizer, Characters):
            settings["alphabet"] = self._tokenizer.alphabet
        if self.kind in OWN:
            settings["eos"] = self.eos
        if self.kind == "bpe":
            size = self._tokenizer.size + self.eos if self._tokenizer else self.vocab_size
            settings["vocab_size"] = size
        return settings

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into the folder, with `config()` as modality.json."""
        self.tokenizer.save(Path(folder))
        settings = json.dumps(self.config(), indent=1, ensure_ascii=False)
        (Path(folder) / SETTINGS).write_text(settings + "\n", encoding="utf-8")


def text(
    *, tokenizer: str = "byte", vocab_size: int | None = None, alphabet: str | None = None,
    eos: bool = False, mask_id: int | None = None, folder: str | Path | None = None,
) -> Text:  # fmt: skip
    """The text modality.

    `tokenizer`: "byte", "char", "bpe" (byte-level, trained on the training split to
    `vocab_size` ids, 512 by default), a folder that `save` wrote, or the path or Hub id of any
    Hugging Face one. `eos` adds an id that ends each document (anyone's tokenizer brings its own).
    `alphabet` are the characters of "char" where they are known. `mask_id` is the id that hides a
    token, where it is not the tokenizer's own or the next free one. `folder` is where `save` wrote.

    Raises ConfigError for options that do not go together.

    >>> text().encode("hi")
    [104, 105]
    """
    if not isinstance(eos, bool):
        raise ConfigError(f"modality.eos={eos!r}: expected true or false")
    for name, given, kind in (("vocab_size", vocab_size, "bpe"), ("alphabet", alphabet, "char")):
        if given is not None and tokenizer != kind:
            raise ConfigError(f"{name} is an option of tokenizer {kind!r}, not of {tokenizer!r}")
    if vocab_size is not None and vocab_size < 256 + eos:
        raise ConfigError(f"vocab_size={vocab_size}: a byte-level bpe needs {256 + eos} or more")
    inner: Tokenizer | None = None
    if tokenizer == "byte":
        inner = Bytes()
    elif tokenizer == "char":
        inner = Characters(alphabet) if alphabet is not None else None
    elif tokenizer == "bpe":
        inner = None if folder is None else BytePairs.read(Path(folder))
        if inner is not None and vocab_size is not None and inner.size + eos != vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {inner.size + eos} ids, the settings {vocab_size}"
            )
    elif (saved := _saved(tokenizer, folder, eos=eos, mask_id=mask_id)) is not None:
        return saved
    elif eos:
        raise ConfigError(f"eos is an option of byte, char and bpe, not of {tokenizer!r}")
    else:
        inner = Pretrained(path_or_id(tokenizer) if folder is None else str(folder))
    return Text(tokenizer, vocab_size=vocab_size, eos=eos, mask_id=mask_id, tokenizer=inner)


def _saved(named: str, folder: str | Path | None, *, eos: bool, mask_id: int | None) -> Text | None:
    """What `Text.save` wrote into the named folder, or, of OWN, into `folder`; None elsewhere."""
    written = Path(named).expanduser() if folder is None else Path(folder)
    settings = read_json(written / SETTINGS) if (written / SETTINGS).exists() else None
    if settings is None or (folder is not None and settings.get("tokenizer") not in OWN):
        return None
    if settings.pop("name", None) != Text.name or eos:
        raise ConfigError(f"{written} is a text tokenizer of its own: it takes no other options")
    if mask_id is not None:
        settings["mask_id"] = mask_id
    try:
        return text(**settings, folder=written)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{written / SETTINGS} is not valid: {error}") from error
