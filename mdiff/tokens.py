"""Token ids and their space, canvases of them, and batches of rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError


@dataclass(frozen=True)
class TokenSpace:
    """The ids of a model: how many, which one hides a token, which are not generated.

    `vocab_size` is the number of logit columns. `mask_id` may lie inside the vocabulary
    (LLaDA) or be `vocab_size`; it is never generated. `never` ids are not generated
    either but may be given. `parts`, for canvases of several kinds of token, is
    ((positions, first_id, stop_id), ...): consecutive runs of positions in canvas order whose
    counts sum to L, with the only ids that they may hold.

    Raises ConfigError for ids outside the vocabulary or parts that permit nothing.

    >>> TokenSpace(4, mask_id=4).permitted
    4
    """

    vocab_size: int
    mask_id: int
    never: tuple[int, ...] = ()
    parts: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("vocab_size", self.vocab_size), ("mask_id", self.mask_id)):
            if type(value) is not int:
                raise ConfigError(f"{name}={value!r}: expected a whole number")
        if self.vocab_size < 1:
            raise ConfigError(f"vocab_size={self.vocab_size}: need at least 1")
        if not 0 <= self.mask_id <= self.vocab_size:
            raise ConfigError(f"mask_id={self.mask_id}: expected 0 to {self.vocab_size}")
        object.__setattr__(self, "never", tuple(sorted({int(i) for i in self.never})))
        object.__setattr__(self, "parts", tuple(tuple(map(int, part)) for part in self.parts))
        if self.never and not 0 <= self.never[0] <= self.never[-1] < self.vocab_size:
            raise ConfigError(f"never={self.never}: expected ids below {self.vocab_size}")
        for positions, first, stop in self.parts:
            if positions < 1 or not 0 <= first < stop <= self.vocab_size:
                raise ConfigError(
                    f"part ({positions}, {first}, {stop}): expected positions >= 1 and "
                    f"0 <= first < stop <= {self.vocab_size}"
                )
            if all(i in self.forbidden for i in range(first, stop)):
                raise ConfigError(f"part ({positions}, {first}, {stop}) permits no id")
        if self.permitted < 1:
            raise ConfigError("no id is left to generate: every one is the mask or in `never`")

    @property
    def forbidden(self) -> tuple[int, ...]:
        """The logit columns that are never generated: `never`, and the mask if it is one."""
        inside = {self.mask_id} if self.mask_id < self.vocab_size else set()
        return tuple(sorted(inside | set(self.never)))

    @property
    def permitted(self) -> int:
        """How many ids can be generated (over all parts)."""
        return self.vocab_size - len(self.forbidden)

    def spans(self, length: int, device: torch.device | str | None = None) -> Tensor | None:
        """The (first, stop) ids of each position, (L, 2) int64, or None without parts.

        Raises DataError where the parts do not sum to `length`.
        """
        if not self.parts:
            return None
        total = sum(positions for positions, _, _ in self.parts)
        if total != length:
            raise DataError(f"canvas of {length} positions: the parts of this model sum to {total}")
        rows = [(first, stop) for positions, first, stop in self.parts for _ in range(positions)]
        return torch.tensor(rows, dtype=torch.int64, device=device)

    def checked(self) -> TokenSpace:
        """The same space for canvases that were checked: its own `check` does nothing."""
        return _CheckedSpace(self.vocab_size, self.mask_id, self.never, self.parts)

    def check(self, tokens: Tensor, valid: Tensor | None = None, *, masks: bool = True) -> None:
        """Raise DataError where `tokens` (B, L) is not a canvas of this space.

        `masks=False` refuses the mask id, as in training data. Padding is not looked at.
        This waits for the device: call it at the border, never in a loop.
        """
        if not isinstance(tokens, Tensor):
            raise DataError(f"tokens are a {type(tokens).__name__}: expected a (B, L) int64 tensor")
        if tokens.dim() != 2 or tokens.dtype != torch.int64 or 0 in tokens.shape:
            raise DataError(
                f"tokens of shape {tuple(tokens.shape)}, type {tokens.dtype}: "
                "expected (B, L) int64, neither of them 0"
            )
        if valid is not None and (valid.shape != tokens.shape or valid.dtype != torch.bool):
            raise DataError(
                f"valid of shape {tuple(valid.shape)} and type {valid.dtype}: "
                f"expected {tuple(tokens.shape)} bool"
            )
        hidden = tokens == self.mask_id
        read = torch.ones_like(hidden) if valid is None else valid
        if not masks and bool((hidden & read).any()):
            raise DataError(f"the data holds the mask id {self.mask_id}")
        bad = read & ~hidden & ((tokens < 0) | (tokens >= self.vocab_size))
        if bool(bad.any()):
            raise DataError(
                f"token {int(tokens[bad][0])}: expected ids below {self.vocab_size}"
                + (f" or the mask {self.mask_id}" if masks else "")
            )
        spans = self.spans(tokens.shape[1], tokens.device)
        if spans is not None:
            bad = read & ~hidden & ((tokens < spans[:, 0]) | (tokens >= spans[:, 1]))
            if bool(bad.any()):
                row, position = (int(i) for i in bad.nonzero()[0])
                first, stop = spans[position].tolist()
                raise DataError(
                    f"token {int(tokens[row, position])} at position {position}: "
                    f"this part holds ids from {first} to {stop - 1}"
                )


class _CheckedSpace(TokenSpace):
    """A space whose canvases were checked where they came in."""

    def check(self, tokens: Tensor, valid: Tensor | None = None, *, masks: bool = True) -> None:
        """Nothing more."""


def check_documents(
    documents: Iterable[Sequence[int]], space: TokenSpace, *, name: str = "document"
) -> None:
    """Raise DataError, with number and position, where one holds the mask or is outside the space.

    >>> check_documents([[0, 1], [2]], TokenSpace(3, mask_id=3))
    """
    for number, ids in enumerate(documents, start=1):
        if not ids or (0 <= min(ids) <= max(ids) < space.vocab_size and space.mask_id not in ids):
            continue
        wrong = (
            i for i, token in enumerate(ids)
            if token == space.mask_id or not 0 <= token < space.vocab_size
        )  # fmt: skip
        at = next(wrong)
        why = "the data holds the mask id" if ids[at] == space.mask_id else "the data holds id"
        known = f"; expected ids below {space.vocab_size} without the mask {space.mask_id}"
        raise DataError(f"{name} {number}, position {at}: {why} {ids[at]}{known}")


def hidden_canvas(batch: int, length: int, *, space: TokenSpace) -> Tensor:
    """A canvas (B, L) int64 on which everything is to be generated.

    >>> hidden_canvas(1, 3, space=TokenSpace(2, mask_id=2)).tolist()
    [[2, 2, 2]]
    """
    if batch < 1 or length < 1:
        raise ConfigError(
            f"a canvas of {batch} rows and {length} positions: need at least 1 of each"
        )
    return torch.full((batch, length), space.mask_id, dtype=torch.int64)


def continued(given: Sequence[int], length: int | None, *, mask_id: int) -> list[int]:
    """The given tokens followed by masks, `length` positions in all (None: no masks).

    Raises ConfigError for a length below 1 and DataError where the tokens hold the mask or do
    not fit the canvas.

    >>> continued([3, 1], 4, mask_id=5)
    [3, 1, 5, 5]
    """
    if length is not None and length < 1:
        raise ConfigError(f"length={length}: need at least 1")
    if mask_id in given:
        raise DataError(f"the given tokens hold the mask id {mask_id}")
    if length is None:
        return list(given)
    if len(given) > length:
        raise DataError(
            f"{len(given)} given tokens do not fit a canvas of {length}; "
            f"raise the length to more than {len(given)}"
        )
    return [*given, *[mask_id] * (length - len(given))]


def stack(rows: Sequence[Sequence[int]], *, space: TokenSpace) -> tuple[Tensor, Tensor | None]:
    """Rows of any lengths as a batch: tokens (B, L) int64 and valid (B, L) bool.

    Shorter rows are padded on the right with id 0; valid is None where none is.

    >>> stack([[1], [2, 3]], space=TokenSpace(5, mask_id=5))[1].tolist()
    [[True, False], [True, True]]
    """
    if not rows or not all(len(row) for row in rows):
        raise ConfigError("an empty canvas: need at least 1 row and 1 position in each")
    sizes = torch.tensor([len(row) for row in rows], device="cpu")
    valid = torch.arange(int(sizes.max()), device="cpu") < sizes[:, None]
    tokens = torch.zeros(valid.shape, dtype=torch.int64, device="cpu")
    tokens[valid] = torch.tensor(
        [token for row in rows for token in row], dtype=torch.int64, device="cpu"
    )
    space.check(tokens, valid)
    return tokens, None if bool(valid.all()) else valid


def stack_conditions(
    conditions: Sequence[Mapping[str, int | Tensor]], null: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The conditions of the rows of a batch, as tensors (B, ...); empty where no row has one.

    An entry of `conditions` holds whole numbers or tensors (...); what it lacks is taken from the
    null condition, (1, ...).
    """
    if not any(conditions):
        return {}
    return {
        name: torch.stack(
            [torch.as_tensor(one.get(name, value[0]), device="cpu") for one in conditions]
        )
        for name, value in null.items()
    }


def ranks(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """The rank (B, L) int64 of each token among its row's valid ones; of padding, the last or 0."""
    if valid is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return (valid.cumsum(1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Batch:
    """Rows for one step, in the order asked for.

    `tokens` (B, L) int64 without masks; `valid` (B, L) bool, None where nothing is padding;
    `documents` (B, L) int64, None where a row is one document; `may_hide` (B, L) bool, None
    where everything may be hidden; `cond` tensors whose first axis is B.
    """

    tokens: Tensor
    valid: Tensor | None = None
    documents: Tensor | None = None
    may_hide: Tensor | None = None
    cond: dict[str, Tensor] = field(default_factory=dict)


class Examples(Protocol):
    """A tokenised data set of rows of one length, readable in any order.

    `fingerprint` is a hex digest of the tokens and of how they are cut into rows: a resumed
    run is refused where it differs. `units` is the mean number of units of the medium, named
    `unit`, that a token stands for, for progress in bits a unit.
    """

    fingerprint: str
    length: int
    unit: str
    units: float

    def __len__(self) -> int:
        """How many rows an epoch has."""

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows number `rows` (B,) int64 of epochs `epoch` (B,); a function of the two alone."""


@runtime_checkable
class Sliced(Protocol):
    """Examples that know the SHA-256 of what was tokenised, whatever was made of it."""

    slice_sha256: str


@dataclass(frozen=True)
class Windows:
    """Rows of any lengths, read by number in batches, as `Examples` are.

    `owner` is the number of the item of which each row is a window; `cond` holds one entry a row.
    """

    rows: list[list[int]]
    owner: list[int]
    space: TokenSpace
    cond: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 padded to the longest; the same in every epoch."""
        tokens, valid = stack([self.rows[row] for row in rows.tolist()], space=self.space)
        cond = {name: tensor[rows] for name, tensor in self.cond.items()}
        return Batch(tokens, valid=valid, cond=cond)
