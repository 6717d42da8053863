"""The one contract of a model: a canvas goes in, logits of the clean tokens come out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, TypeGuard, _ProtocolMeta, runtime_checkable

import torch
from torch import Tensor, nn

from mdiff.errors import ConfigError
from mdiff.kernels.loss_heads import hooked

Condition = Mapping[str, Tensor]


class Cache(Protocol):
    """The keys and values of the positions before a block, of a batch of rows.

    While `growing` is true, those of the tokens of a call are kept; `length` positions are.
    """

    growing: bool

    @property
    def length(self) -> int: ...

    def of_rows(self, rows: Tensor) -> Cache:
        """The cache of some rows of the batch, `rows` (N,) int64."""


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the clean token at each position of a canvas.

    `tokens` (B, L) int64, the mask id where a token is hidden. Returns raw, unshifted logits:
    row i predicts token i. Without `at` (B, L, V); with `at` (B, L) bool only those rows,
    (N, V), in row-major order. `valid` (B, L) bool, False is padding. `documents` (B, L) int64:
    positions attend to their own document only. `t` (B,) or None. `cond` None or a dict of
    tensors whose first axis is B. A block model applies its block mask in every call.

    What only some denoisers have is a Protocol of its own, below. A denoiser (or its `features`)
    with a keyword `number` is also given how many positions are in `at`, where that is known
    without a host-device synchronisation.
    """

    @property
    def uses_time(self) -> bool:
        """Whether a call needs `t`."""

    def __call__(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Cache | None = None,
    ) -> Tensor: ...


class _Capability(_ProtocolMeta):
    """Of the Protocols below: `isinstance` is True where the value has all of their members.

    Members that a wrapper passes on by `__getattr__` count (torch.nn.Module, peft, a compiled
    module); the `isinstance` of Python 3.12 does not find those.
    """

    def __instancecheck__(self, instance: object) -> bool:
        members = (name for kind in self.__mro__ for name in vars(kind) if not name.startswith("_"))
        return all(hasattr(instance, name) for name in members)


@runtime_checkable
class BlockModel(Protocol, metaclass=_Capability):
    """A model of blocks of `block_length` positions; None where it is not one after all."""

    @property
    def block_length(self) -> int | None: ...


@runtime_checkable
class HasCache(Protocol, metaclass=_Capability):
    """A block model that keeps the keys and values of finished blocks."""

    def new_cache(self) -> Cache:
        """An empty cache for one batch."""


@runtime_checkable
class HasFeatures(Protocol, metaclass=_Capability):
    """A model that gives what its head reads."""

    def features(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Tensor:
        """What the head reads, (B, L, D), or the rows `at` (N, D)."""


@runtime_checkable
class HasHead(HasFeatures, Protocol, metaclass=_Capability):
    """A model of features (N, D) and a head, (N, D) -> (N, V)."""

    @property
    def head(self) -> Callable[[Tensor], Tensor]: ...


@runtime_checkable
class HasCost(Protocol, metaclass=_Capability):
    """A denoiser whose call costs each row `evaluations` of a model, not one."""

    @property
    def evaluations(self) -> int: ...


@runtime_checkable
class HasRowCost(Protocol, metaclass=_Capability):
    """A denoiser whose cost depends on the canvas; it counts before `HasCost`."""

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
    ) -> int | Tensor:
        """The model evaluations of a call: one number, or (B,) int64."""


@runtime_checkable
class HasDevice(Protocol, metaclass=_Capability):
    """A model on several devices: a call takes its tokens on `main_device` (None: on its own)."""

    @property
    def main_device(self) -> torch.device | None: ...


@runtime_checkable
class HasWindow(Protocol, metaclass=_Capability):
    """A model that knows the length that it was trained on; None where it does not after all."""

    @property
    def window(self) -> int | None: ...


@runtime_checkable
class Saveable(Protocol, metaclass=_Capability):
    """A model that writes its own config and weights."""

    def save_pretrained(
        self, directory: str | Path, /, *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write them into a directory; `state_dict` are weights to write instead of its own."""


@runtime_checkable
class RowBound(Protocol, metaclass=_Capability):
    """A denoiser that holds something of each row of its batch."""

    def for_rows(self, index: Tensor) -> Denoiser:
        """The same for the rows `index` (N,) int64 of its batch alone."""


@runtime_checkable
class AsksRows(Protocol):
    """A denoiser made of another one that gives what was asked for before head and guidance."""

    def requested_rows(
        self,
        tokens: Tensor,
        *,
        at: Tensor,
        number: int | None = None,
        valid: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Rows:
        """The rows at the positions `at` (B, L) bool, of which there are `number`."""


class Rows(NamedTuple):
    """The rows that a sampler asked for, before the head and before guidance.

    `conditional` is (N, D), what `head` makes logits (N, V) of, or those logits where `head`
    is None. With `unconditional`, the same of the other branch, row n is to be
    u + s (c - u), s = `scale` (N,) float64; where s is 1 its unconditional row has no meaning.
    """

    conditional: Tensor
    unconditional: Tensor | None = None
    scale: Tensor | None = None
    head: Callable[[Tensor], Tensor] | None = None


def flat_positions(at: Tensor, number: int | None = None) -> Tensor:
    """The flat indices (N,) int64 of the positions `at` (B, L) bool among all B * L, ascending.

    `number` of them, where that is known on the host: then without a host-device
    synchronisation.

    >>> flat_positions(torch.tensor([[False, True]]), 1)
    tensor([1])
    """
    if number is None:
        return at.flatten().nonzero()[:, 0]
    return torch.nonzero_static(at.flatten(), size=number)[:, 0]


def row_request(denoiser: Denoiser) -> Callable[..., Rows]:
    """How to ask a denoiser for `Rows`, looked up once for many calls.

    The result is called as `AsksRows.requested_rows` is, with `cache=` too where the denoiser
    takes one. It runs without the head where the denoiser has one of its own, so that logits
    need not exist all at once.
    """
    if asks_rows(denoiser):
        return denoiser.requested_rows
    split = denoiser if has_own_head(denoiser) else None
    head = None if split is None else split.head
    call: Callable[..., Tensor] = denoiser if split is None else split.features
    counts = _takes_number(call)

    def ask(tokens: Tensor, *, number: int | None = None, **rest: object) -> Rows:
        rest = {**rest, "number": number} if counts else rest
        return Rows(call(tokens, **rest), head=head)

    return ask


def asks_rows(denoiser: object) -> TypeGuard[AsksRows]:
    """Whether the denoiser's own class has `requested_rows`: a wrapper's inner one is bypassed."""
    return issubclass(type(denoiser), AsksRows)


def has_own_head(denoiser: object) -> TypeGuard[HasHead]:
    """Whether a call of the denoiser is that of its `features` and then of its `head`.

    Only what its own class says counts: a wrapper (an adapter's, a compiled or distributed
    module, guidance) that passes `features` through changes what a call does, and so do hooks
    and a class that replaces the call of one that has `features`.
    """
    if not isinstance(denoiser, HasHead) or denoiser.head is None:
        return False
    if any(isinstance(m, nn.Module) and hooked(m) for m in (denoiser.head, denoiser)):
        return False
    called = "forward" if isinstance(denoiser, nn.Module) else "__call__"
    for kind in type(denoiser).__mro__:
        if "features" in vars(kind):
            return True
        if called in vars(kind):
            return False
    return False


def _takes_number(call: Callable[..., Tensor]) -> bool:
    """Whether a denoiser, or its `features`, has a keyword `number` of its own."""
    try:
        signature = inspect.signature(call.forward if isinstance(call, nn.Module) else call)
    except (TypeError, ValueError):
        return False
    return "number" in signature.parameters


def evaluations(
    denoiser: Denoiser, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
) -> int | Tensor:
    """The model evaluations that a call on these rows costs: one number, or (B,) int64."""
    if isinstance(denoiser, HasRowCost):
        return denoiser.row_evaluations(tokens, valid=valid, cond=cond)
    return fixed_evaluations(denoiser)


def fixed_evaluations(denoiser: Denoiser) -> int:
    """The model evaluations that a call costs each row, where that is the same for all."""
    return denoiser.evaluations if isinstance(denoiser, HasCost) else 1


def block_length_of(denoiser: Denoiser) -> int | None:
    """The length of a block model's blocks; None for another denoiser."""
    return denoiser.block_length if isinstance(denoiser, BlockModel) else None


def check_rows(tokens: Tensor, rows: int) -> None:
    """ConfigError where a denoiser that is bound to so many rows is called on others."""
    if len(tokens) != rows:
        raise ConfigError(
            f"{len(tokens)} rows: this denoiser is bound to {rows}, take its for_rows(index)"
        )


class FromLogits:
    """A Denoiser over a function of the tokens alone; see `from_logits`."""

    uses_time = False

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        self.fn = fn

    def __call__(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The function's logits, (B, L, V) or the rows `at` (N, V)."""
        logits = self.fn(tokens)
        return logits if at is None else logits[at]


def from_logits(fn: Callable[[Tensor], Tensor]) -> FromLogits:
    """A Denoiser from `fn(tokens (B, L)) -> logits (B, L, V)`: for toys and tests.

    >>> model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
    >>> model(torch.zeros(2, 3, dtype=torch.int64)).shape
    torch.Size([2, 3, 5])
    """
    return FromLogits(fn)
