"""Text: a tokenizer, the canvases that prompts and templates make, and rows for training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdiff.errors import CheckpointError, ConfigError, DataError, nearest
from mdiff.files import read_json
from mdiff.modalities.text.documents import Source, cut_documents, digest
from mdiff.modalities.text.packing import PackedRows
from mdiff.modalities.text.pretrained import Pretrained
from mdiff.modalities.text.template import HOLE, template_canvas
from mdiff.modalities.text.tokenizers import BytePairs, Bytes, Characters, Tokenizer
from mdiff.tokens import TokenSpace, continued

SETTINGS = "modality.json"
OWN = ("byte", "char", "bpe")
BPE_SIZE = 512


class Text:
    """Text to tokens and back; see `text`.

    `unit` is "byte", of UTF-8. `space` is known once the tokenizer is: at once for "byte" and
    anyone's tokenizer, after the first `examples` (or `fit`) for "char" and "bpe".
    """

    name = "text"
    unit = "byte"

    def __init__(
        self,
        kind: str,
        *,
        vocab_size: int | None,
        eos: bool,
        mask_id: int | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.kind = kind
        self._mask_id = mask_id
        self.vocab_size = vocab_size
        self.eos = eos
        self._tokenizer = tokenizer

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
        return (self.tokenizer.size,) if self.eos else self.tokenizer.end_ids

    @property
    def pad_id(self) -> int | None:
        """The tokenizer's own padding id, or None; canvases are padded by `valid` instead."""
        return self.tokenizer.pad_id

    def encode(self, text: object) -> list[int]:
        """The ids of a text, with nothing added; DataError where it is not valid Unicode."""
        if not isinstance(text, str):
            raise DataError(f"{text!r:.60}: expected a text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"character {error.start} is not valid Unicode text") from None
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], *, whole: bool = False) -> str:
        """The text up to the first end of text, or the `whole` of it; masks are left out."""
        shown = ids if whole else ids[: self._end(ids)]
        left_out = {self.mask_id, *((self.eos_id,) if self.kind in OWN else ())}
        return self.tokenizer.decode([token for token in shown if token not in left_out])

    def pieces(self, ids: Sequence[int]) -> list[str | None]:
        """The text of each position, None where it is masked; after the end of text, ""."""
        mask, stop = self.mask_id, self._end(ids)
        spoken = [i for i, token in enumerate(ids[:stop]) if token != mask]
        texts = dict(zip(spoken, self.tokenizer.pieces([ids[i] for i in spoken])))
        return [None if token == mask else texts.get(i, "") for i, token in enumerate(ids)]

    def _end(self, ids: Sequence[int]) -> int:
        """How many ids come before the end of text."""
        eos = self.eos_id
        return len(ids) if eos is None or eos not in ids else list(ids).index(eos)

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The prompt's tokens followed by masks, `length` positions in all.

        A prompt {"chat": ...} is what a user says, or a list of {"role", "content"} messages,
        put as the tokenizer's chat template puts it. Raises DataError where the prompt holds a
        mask or does not fit, and where there is no template.
        """
        if isinstance(prompt, Mapping):
            hole, ids = None, self._chat(prompt)
        else:
            ids = self.encode(prompt)
            hole = HOLE.search(str(prompt))
        if hole or self.mask_id in ids:
            shown = hole[0] if hole else "the mask token"
            raise DataError(
                f"the prompt holds {shown}, which is not text; to fill in gaps use infill"
            )
        return continued(ids, length, mask_id=self.mask_id)

    def _chat(self, prompt: Mapping[str, object]) -> list[int]:
        """The ids of {"chat": a text or messages}."""
        said = prompt.get("chat")
        if set(prompt) != {"chat"} or not isinstance(said, str | list):
            raise DataError(f'{dict(prompt)!r}: expected {{"chat": a text or a list of messages}}')
        if not isinstance(self.tokenizer, Pretrained):
            raise DataError(f"the {self.kind} tokenizer has no chat template: give a plain prompt")
        return self.tokenizer.chat(said)

    def template(self, text: str) -> list[int]:
        """The canvas of a text with gaps; see `template_canvas`."""
        return template_canvas(text, self.encode, mask_id=self.mask_id)

    def fit(self, documents: Sequence[str]) -> Text:
        """Train the tokenizer on these documents if it needs it and has not been."""
        if self._tokenizer is None and self.kind == "char":
            self._tokenizer = Characters.learn(documents)
        elif self._tokenizer is None:
            size = (self.vocab_size or BPE_SIZE) - self.eos
            self._tokenizer = BytePairs.learn(documents, size=size)
        return self

    def examples(
        self,
        data: Mapping[str, object] | Source | str,
        *,
        length: int | None,
        split: str = "train",
    ) -> PackedRows:
        """Rows of `length` tokens of a split: "train", "validation" or "holdout".

        The tokenizer is trained first where it has not been, on the training split only.
        Training rows shift between epochs; the others lie side by side and are padded.
        """
        if length is None:
            raise ConfigError("data.length is missing: how many tokens a row of text has")
        source = Source.of(data)
        everything = source.documents()
        shares = {"holdout": source.holdout, "validation": source.validation}
        if self._tokenizer is None:
            self.fit(cut_documents(everything, "train", **shares))
        documents = cut_documents(everything, split, **shares)
        end = [] if self.eos_id is None else [self.eos_id]
        rows = [self.encode(document) + end for document in documents]
        tokens = sum(map(len, rows))
        return PackedRows(
            rows,
            length=length,
            shift=split == "train",
            unit=self.unit,
            units=sum(len(document.encode()) for document in documents) / max(1, tokens),
            slice_sha256=digest(documents),
        )

    def sizes(self, texts: Sequence[str]) -> dict[str, int]:
        """How many characters and UTF-8 bytes the texts have, for figures by each."""
        return {
            "char": sum(map(len, texts)),
            "byte": sum(len(text.encode()) for text in texts),
        }

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
    *,
    tokenizer: str = "byte",
    vocab_size: int | None = None,
    alphabet: str | None = None,
    eos: bool = False,
    mask_id: int | None = None,
    folder: str | Path | None = None,
) -> Text:
    """The text modality.

    `tokenizer`: "byte", "char", "bpe" (byte-level, trained on the training split to
    `vocab_size` ids, 512 by default), a folder that `save` wrote, or the path or Hub id of any
    Hugging Face one. `eos`
    adds an id that ends each document (anyone's tokenizer brings its own). `alphabet` are the
    characters of "char" where they are known. `mask_id` is the id that hides a token, where it
    is not the tokenizer's own or the next free one. `folder` is where `save` wrote.

    Raises ConfigError for options that do not go together.

    >>> text().encode("hi")
    [104, 105]
    """
    if not isinstance(eos, bool):
        raise ConfigError(f"modality.eos={eos!r}: expected true or false")
    if vocab_size is not None and tokenizer != "bpe":
        raise ConfigError(f"vocab_size is an option of tokenizer 'bpe', not of {tokenizer!r}")
    if alphabet is not None and tokenizer != "char":
        raise ConfigError(f"alphabet is an option of tokenizer 'char', not of {tokenizer!r}")
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
    elif (Path(tokenizer) / SETTINGS).exists() and folder is None:
        return _saved(Path(tokenizer), eos=eos, mask_id=mask_id)
    else:
        inner = _pretrained(tokenizer, folder)
        if eos:
            raise ConfigError(f"eos is an option of byte, char and bpe, not of {tokenizer!r}")
    return Text(tokenizer, vocab_size=vocab_size, eos=eos, mask_id=mask_id, tokenizer=inner)


def _saved(folder: Path, *, eos: bool, mask_id: int | None) -> Text:
    """What `Text.save` wrote."""
    settings = read_json(folder / SETTINGS)
    if settings.pop("name", None) != Text.name or eos:
        raise ConfigError(f"{folder} is a text tokenizer of its own: it takes no other options")
    if mask_id is not None:
        settings["mask_id"] = mask_id
    try:
        return text(**settings, folder=folder)
    except (TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder / SETTINGS} is not valid: {error}") from error


def _pretrained(name: str, folder: str | Path | None) -> Pretrained:
    if folder is not None:
        return Pretrained(str(folder))
    looks_like_a_name = "/" not in name and not Path(name).exists()
    close = nearest(name, OWN)
    if looks_like_a_name and close.startswith("did you mean"):
        raise ConfigError(f"unknown tokenizer {name!r}; {close}")
    return Pretrained(name)
