"""Plain token ids: the modality of a model that comes without a tokenizer or codec."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mdiff.errors import ConfigError, DataError
from mdiff.modalities.text.documents import Source, cut_documents, digest
from mdiff.modalities.text.packing import PackedRows
from mdiff.modalities.text.source import DataSource
from mdiff.tokens import TokenSpace, check_documents, continued

MASK = "_"
FIELD = "tokens"


class Ids:
    """Ids as they are; see `ids`. `unit` is "token"."""

    name, unit = "ids", "token"

    def __init__(self, vocab_size: int, mask_id: int) -> None:
        self.vocab_size, self.mask_id = vocab_size, mask_id

    @property
    def space(self) -> TokenSpace:
        """The ids below `vocab_size`, and the mask."""
        return TokenSpace(self.vocab_size, mask_id=self.mask_id)

    def encode(self, written: object) -> list[int]:
        """The ids of "3 1 2", or of a list of them; DataError for anything else."""
        try:
            words = written.split() if isinstance(written, str) else written
            if isinstance(words, Iterable):
                return [int(word) for word in words]
            raise TypeError
        except (TypeError, ValueError):
            said = f"{written!r:.60}: this model takes token ids, such as '3 1 2'"
            raise DataError(said) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The ids, with spaces between; a mask is "_"."""
        return " ".join(MASK if token == self.mask_id else str(token) for token in tokens)

    def pieces(self, tokens: Sequence[int]) -> list[str | None]:
        """Each id with a space after it, None where it is masked."""
        return [None if token == self.mask_id else f"{token} " for token in tokens]

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The given ids followed by masks, `length` positions in all."""
        return continued(self.encode(prompt), length, mask_id=self.mask_id)

    def template(self, written: str) -> list[int]:
        """The canvas of "3 _ _ 1", each "_" one token to fill in."""
        words = written.split()
        if MASK not in words:
            raise DataError("nothing to fill in: write _ where a token is to appear")
        return [self.mask_id if word == MASK else self.encode(word)[0] for word in words]

    def examples(
        self, data: Mapping[str, object] | Source | str, *, length: int | None, split: str = "train"
    ) -> PackedRows:
        """Rows of `length` ids from rows {"tokens": [3, 1, 2]}; `holdout` cuts by ids."""
        source = Source.of(data)
        if length is None:
            raise ConfigError("data.length is missing: how many tokens a row has")
        rows = self.documents(source)
        chosen = cut_documents(rows, split, holdout=source.holdout, validation=source.validation)
        check_documents(chosen, self.space, name=f"{split} document")
        return PackedRows(
            chosen, length=length, shift=split == "train", unit=self.unit, units=1.0,
            slice_sha256=digest(list(map(self.decode, chosen))),
        )  # fmt: skip

    def documents(self, data: Mapping[str, object] | DataSource | str) -> list[list[int]]:
        """The lists of ids of a data section, in its field "tokens" unless that says another.

        Raises DataError with file and line where one holds anything else.
        """
        source, found = Source.of(data), []
        field = FIELD if source.field == Source.field else source.field
        for where, row in source.rows(field, lines=True):
            ids = row.get(field)
            if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
                raise DataError(
                    f"{where}: expected {{{field!r}: [3, 1, 2]}}, got {dict(row)!r:.80}"
                )
            found.append(ids)
        return found

    def sizes(self, items: Sequence[object]) -> dict[str, int]:
        """Nothing but tokens is known of ids."""
        return {}

    def config(self) -> dict[str, object]:
        """The settings that `ids` takes back, with the name."""
        return {"name": self.name, "vocab_size": self.vocab_size, "mask_id": self.mask_id}

    def save(self, folder: str | Path) -> None:
        """Nothing to write."""


def ids(*, vocab_size: int, mask_id: int | None = None, folder: str | Path | None = None) -> Ids:
    """The modality of ids below `vocab_size`; the mask is the next one if not given.

    >>> ids(vocab_size=5).canvas("3 1", 3)
    [3, 1, 5]
    """
    return Ids(vocab_size, vocab_size if mask_id is None else mask_id)
