"""The one contract of a model: a canvas goes in, logits of the clean tokens come out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, _ProtocolMeta, runtime_checkable

import torch
from torch import Tensor

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
class SeedsBlocks(Protocol, metaclass=_Capability):
    """A block model; where `block_seed`, a block's first token is to be written before the others.

    Its row is then of the block before, so that it may be asked for alone.
    """

    @property
    def block_seed(self) -> bool: ...


@runtime_checkable
class Corrects(Protocol, metaclass=_Capability):
    """A model that, where `corrects`, was trained to correct tokens that it is shown."""

    @property
    def corrects(self) -> bool: ...


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
class Predicts(Protocol, metaclass=_Capability):
    """A denoiser that says what it predicts: "leave_one_out", P(x_i | z without z_i), or
    "posterior", P(x_i | z). At masks both are the same.
    """

    @property
    def predicts(self) -> str: ...


@runtime_checkable
class Wrapper(Protocol, metaclass=_Capability):
    """A denoiser made of another one."""

    @property
    def denoiser(self) -> Denoiser: ...


@runtime_checkable
class HasDevice(Protocol, metaclass=_Capability):
    """A model on several devices: a call takes its tokens on `main_device` (None: on its own)."""

    @property
    def main_device(self) -> torch.device | None: ...


@runtime_checkable
class HasParameters(Protocol):
    """A denoiser with weights, such as a `torch.nn.Module`."""

    def parameters(self) -> Iterable[Tensor]:
        """Its weights."""


@runtime_checkable
class HasLayers(Protocol, metaclass=_Capability):
    """A model with layers of the classes named `no_split`: each stays on one device, or shards."""

    @property
    def no_split(self) -> Sequence[str]: ...


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


@runtime_checkable
class ShadowPositions(Protocol, metaclass=_Capability):
    """A denoiser that predicts standing tokens without looking at them, in the call of the others.

    Behind the canvas stands a shadow for each standing token that is asked for: a mask of the same
    position, which attends to itself and to all that the position attends to but the position,
    and to which nothing else attends (Hong et al. 2025, WINO). The rows of masks are those of a
    call without shadows. With one layer the row of a shadow is that of the canvas with its
    position hidden; with more, what it reads of the other positions depends on the token.
    """

    def has_shadows(self) -> bool:
        """Whether it can; a wrapper asks the denoiser inside."""

    def shadow_rows(
        self,
        tokens: Tensor,
        *,
        at: Tensor,
        mask_id: int,
        number: int | None = None,
        valid: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
    ) -> Rows:
        """The rows at the `number` positions `at` (B, L) bool, those of tokens by their shadows."""


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

    def some(self, index: Tensor) -> Rows:
        """The rows `index` (M,) int64 of them."""
        other = None if self.unconditional is None else self.unconditional[index]
        scale = None if self.scale is None else self.scale[index]
        return Rows(self.conditional[index], other, scale, self.head)
