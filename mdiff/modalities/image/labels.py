"""Labels: a name and its number, and the one way from either to the other."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError, nearest, warn

ROLES = ("none", "condition", "part")
# A number above this is no label: a name and a row of an embedding are made for each below it.
MOST_LABELS = 1 << 16
# Of numbers up to FEW_LABELS any may be missing; above, a tenth of them must occur.
FEW_LABELS, LEAST_SHARE = 256, 0.1
# Of all names together: a saved model writes them into JSON, which is read up to a bound.
MOST_CHARACTERS = 1 << 21
# Labels that a line names.
NAMED = 8
# Digits of a name that is taken as a number.
MOST_DIGITS = 18


def checked(label: object, where: str) -> str | int:
    """A label as its name or number; DataError, beginning with `where`, for what is neither."""
    if isinstance(label, str):
        try:
            label.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where} = {label!r:.60}: expected text in UTF-8") from None
        return str(label)
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise DataError(
            f"{where} = {label!r:.60}: expected a name or a whole number; in YAML and JSON names "
            'such as "yes", "null" and "1.0" are quoted'
        )
    number = int(label)
    if number < 0:
        raise DataError(f"{where} = {number}: expected 0 or more")
    if number >= MOST_LABELS:
        raise DataError(f"{where} = {str(number)[:60]}: expected less than {MOST_LABELS:,}")
    return number


def numbered(labels: Sequence[object], where: Sequence[str]) -> tuple[Tensor | None, list[str]]:
    """Labels of a data set as numbers (N,) int64, and their names by number; None without any.

    Numbers are their own names, up to the largest; names are sorted, as numbers where all are
    digits. Raises DataError, naming one of `where`, for labels that some lack or that `checked`
    refuses, and for numbers of which hardly any occur.
    """
    with_label = [i for i, label in enumerate(labels) if label is not None]
    if not with_label:
        return None, []
    if len(with_label) < len(labels):
        without = next(i for i, label in enumerate(labels) if label is None)
        raise DataError(f"{where[with_label[0]]} has a label and {where[without]} has none")
    found = [checked(label, f"{at}: label") for label, at in zip(labels, where)]
    numbers = [label for label in found if isinstance(label, int)]
    if len(numbers) == len(found):
        top, different = max(numbers), len(set(numbers))
        if top >= FEW_LABELS and different < LEAST_SHARE * (top + 1):
            raise DataError(
                f"{where[numbers.index(top)]}: label = {top}: {different} of the {top + 1:,} "
                "labels up to it occur: expected numbers from 0 on with few gaps"
            )
        return torch.tensor(numbers, dtype=torch.int64), [str(i) for i in range(top + 1)]
    names = sorted({str(label) for label in found})
    if all(map(_is_number, names)):
        names.sort(key=int)
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[str(label)] for label in found], dtype=torch.int64), names


def _key(name: str) -> str:
    """What two ways of writing one name share: case and composed characters do not count."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).lower())


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= MOST_DIGITS


@dataclass(frozen=True)
class Labels:
    """The names of a model's labels by number, each in lower case and composed (NFC).

    Raises ConfigError where there is none, or where two are the same.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.names or len(self._by_name) < len(self.names):
            raise ConfigError("modality.labels: expected different names, at least one")

    @classmethod
    def of(cls, names: object) -> Labels:
        """From an option or a saved model; ConfigError for what is no list of different names."""
        if not isinstance(names, Sequence) or isinstance(names, str | bytes):
            raise ConfigError(f"modality.labels={names!r:.60}: expected a list of names")
        try:
            found = [checked(name, f"modality.labels[{i}]") for i, name in enumerate(names)]
        except DataError as error:
            raise ConfigError(str(error)) from None
        return cls(tuple(_key(str(name)) for name in found))

    @classmethod
    def learnt(cls, names: Sequence[str]) -> Labels:
        """From the names of a data set; DataError, naming both, where two are one label.

        That is where they differ in case or in composition alone, or are the same number.
        """
        numbers = all(map(_is_number, names))
        first: dict[str | int, str] = {}
        for name in names:
            other = first.setdefault(int(name) if numbers else _key(name), name)
            if other != name:
                raise DataError(
                    f"labels {other!a} and {name!a} are one name to a model: rename one of them, "
                    "or join them"
                )
        if sum(map(len, names)) > MOST_CHARACTERS or len(names) > MOST_LABELS:
            raise DataError(
                f"{len(names):,} labels of {sum(map(len, names)):,} characters: at most "
                f"{MOST_LABELS:,} of {MOST_CHARACTERS:,} in all"
            )
        return cls(tuple(map(_key, names)))

    @cached_property
    def _by_name(self) -> dict[str, int]:
        return {_key(name): number for number, name in enumerate(self.names)}

    @cached_property
    def _by_value(self) -> dict[int, int]:
        """The numbers by what the names say, {} where not all are digits."""
        if not all(map(_is_number, self.names)):
            return {}
        return {int(name): number for number, name in enumerate(self.names)}

    def _find(self, name: str) -> int | None:
        """The number of a name, None where there is none."""
        found = self._by_name.get(_key(name))
        if found is None and _is_number(name):
            return self._by_value.get(int(name))
        return found

    def number(self, label: object) -> int:
        """The number of a label by its name or number; DataError with the nearest names.

        Where all names are digits, 2 is the label of that name, whatever its number.
        """
        given = checked(label, "label")
        found = self._find(str(given))
        if found is None and isinstance(given, int) and not self._by_value:
            found = given if given < len(self.names) else None
        if found is None:
            raise DataError(f"unknown label {label!r:.60}; {nearest(str(label), self.names)}")
        return found

    def own(self, labels: Tensor, names: Sequence[str]) -> Tensor:
        """Labels (N,) int64 into `names` as numbers into ours: by name, where one is known.

        Where none is and all are digits, each is the number of ours that it says. Raises
        DataError for a label that we lack.
        """
        occurring = sorted(set(labels.tolist()))
        if occurring and not 0 <= occurring[0] <= occurring[-1] < len(names):
            raise DataError(f"label {occurring[-1]}: the data names {len(names)} labels")
        found = {i: self._find(names[i]) for i in occurring}
        unknown = [names[i] for i, number in found.items() if number is None]
        digits = all(map(_is_number, names)) and not self._by_value
        if unknown and (not digits or len(unknown) < len(found)):
            raise DataError(f"unknown label {unknown[0]!r:.60}; {nearest(unknown[0], self.names)}")
        if unknown:
            most = max(map(int, names))
            if most >= len(self.names):
                raise DataError(f"label {most}: the model has {len(self.names)} labels")
            found = {i: int(names[i]) for i in occurring}
        table = torch.zeros(len(names), dtype=torch.int64)
        table[occurring] = torch.tensor([found[i] or 0 for i in occurring], dtype=torch.int64)
        return table[labels]

    def check_training(
        self, training: Tensor, everything: Tensor, *, holdout: float, validation: float
    ) -> None:
        """DataError where the training split has no picture of a label that the data has.

        Labels (N,) int64 by our numbers. A line names those of which the data has none.
        """
        count = len(self.names)
        trained, there = (each.bincount(minlength=count) > 0 for each in (training, everything))
        for number in (there & ~trained).nonzero()[:1, 0].tolist():
            raise DataError(
                f"label {self.names[number]!r} has no picture to train on: holdout={holdout} and "
                f"validation={validation} take all of its {int((everything == number).sum())}"
            )
        never = [self.names[i] for i in (~there).nonzero()[:, 0].tolist()]
        if never:
            shown = ", ".join(never[:NAMED]) + (", ..." if len(never) > NAMED else "")
            warn(f"{len(never)} of {count} labels have no picture and are not trained: {shown}")
