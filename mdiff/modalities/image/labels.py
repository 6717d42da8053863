"""The labels of an image modality: their names by number, and what a label is to the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError, nearest

ROLES = ("none", "condition", "part")


class Labels:
    """`names` by number, None until they are learnt from data; `role` is one of ROLES.

    Raises ConfigError for another role, and for names that are not different or none at all.
    """

    def __init__(self, names: Sequence[str] | None = None, role: str = "none") -> None:
        if role not in ROLES:
            raise ConfigError(f"modality.label={role!r}; {nearest(str(role), ROLES)}")
        self.names = None if names is None else [str(name).lower() for name in names]
        self.role = role
        if self.names is not None and (not self.names or len(set(self.names)) < len(self.names)):
            raise ConfigError("modality.labels: expected different names, at least one")

    @property
    def known(self) -> list[str]:
        """The names; ConfigError where they are not known yet."""
        if not self.names:
            raise ConfigError("the labels are not known yet: give modality.labels or data first")
        return self.names

    def number(self, label: object) -> int:
        """The number of a label by its name or number; DataError with the nearest names."""
        known = self.known
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(known):
            return label
        name = str(label).lower()
        if name not in known:
            raise DataError(f"unknown label {label!r}; {nearest(name, known)}")
        return known.index(name)

    def learn(self, labels: Tensor | None, names: Sequence[str]) -> None:
        """Take the names of a data set's labels, unless they are known or labels have no role."""
        if self.role == "none":
            return
        if labels is None:
            raise DataError("the pictures have no labels: modality.label must be none")
        if self.names is None:
            self.names = [name.lower() for name in names]

    def own(self, labels: Tensor | None, names: Sequence[str]) -> Tensor | None:
        """Labels (N,) int64 into `names` as numbers into ours: by name, where they have any.

        Numbers are taken to be the model's own. Raises DataError for a label that it lacks.
        """
        if self.role == "none" or labels is None:
            return labels
        known, given = self.known, [name.lower() for name in names]
        unknown = [name for name in given if name not in known]
        if not unknown:
            return torch.tensor([known.index(name) for name in given])[labels]
        if not all(name.isdigit() for name in given):
            raise DataError(f"unknown label {unknown[0]!r}; {nearest(unknown[0], known)}")
        if len(given) > len(known):
            raise DataError(f"label {len(given) - 1}: the model has {len(known)} labels")
        return labels
