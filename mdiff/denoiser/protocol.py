"""The one contract of a model: a canvas goes in, logits of the clean tokens come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mdiff.denoiser.places import counted, number_of
from mdiff.errors import ConfigError, nearest
from mdiff.kernels.loss_heads import hooked
from mdiff.kernels.reference import guided_logits
from mdiff.tokens import TokenSpace

Condition = Mapping[str, Tensor]


@runtime_checkable
class Denoiser(Protocol):
    """Predicts the clean token at each place of a canvas.

    `tokens` (B, L) int64, the mask id where a token is hidden. Returns raw, unshifted logits:
    row i predicts token i. Without `at` (B, L, V); with `at` (B, L) bool only those rows,
    (N, V), in row-major order. `valid` (B, L) bool, False is padding. `documents` (B, L) int64:
    places see only places of their own document. `t` (B,) or None. `cond` None or a dict of
    tensors whose first axis is B. A block model applies its block mask in every call.

    Optional: `features(tokens, *, at, ...)` -> (N, D) and `head`, a module (N, D) -> (N, V),
    of which the call is made; `evaluations`, the number of model evaluations that one call
    costs each row (1 where absent, 2 where guided); and where that depends on the canvas,
    `row_evaluations(tokens, *, valid, cond)` -> the same as (B,) int64, which then counts.
    A block model has `block_length`, None where it is not one. It may give `new_cache()`: a cache
    of the places before a block, which keeps those of the tokens that it is called with while
    its `growing` is true, has their number as its `length` and gives `of_rows(rows (N,))`.
    What is made of another denoiser may give `asked_rows(tokens, *, at, valid, t, cond)` -> Rows,
    so that `rows_of` need not see its logits.
    """

    uses_time: bool

    def __call__(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Any = None,
    ) -> Tensor: ...


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


def rows_of(
    denoiser: Denoiser,
    tokens: Tensor,
    *,
    at: Tensor,
    valid: Tensor | None = None,
    t: Tensor | None = None,
    cond: Condition | None = None,
    cache: Any = None,
) -> Rows:
    """What the denoiser says of the places `at` (B, L) bool, row-major, as late as it can.

    Without the head where it has one of its own, so that logits need not exist all at once.
    A `cache` is one of the denoiser's own.
    """
    told: dict[str, Any] = {} if cache is None else {"cache": cache}
    return asker(denoiser)(tokens, at=at, valid=valid, t=t, cond=cond, **told)


def asker(denoiser: Any) -> Callable[..., Rows]:
    """`rows_of` of one denoiser, looked up once for many calls."""
    if hasattr(type(denoiser), "asked_rows"):
        asked: Callable[..., Rows] = denoiser.asked_rows
        return asked
    head = own_head(denoiser)

    def ask(tokens: Tensor, **told: Any) -> Rows:
        if head is None:
            return Rows(denoiser(tokens, **told))
        return Rows(denoiser.features(tokens, **told), head=head)

    return ask


def own_head(denoiser: Any) -> Callable[[Tensor], Tensor] | None:
    """The head where a call of the denoiser is that of `features` and then of it, else None.

    Only what its own class says counts: a wrapper (an adapter's, a compiled or distributed
    module, guidance) that passes `features` through changes what a call does, and so do hooks
    and a class that replaces the call of one that has `features`.
    """
    head: Callable[[Tensor], Tensor] | None = getattr(denoiser, "head", None)
    if head is None or any(isinstance(m, nn.Module) and hooked(m) for m in (head, denoiser)):
        return None
    called = "forward" if isinstance(denoiser, nn.Module) else "__call__"
    for kind in type(denoiser).__mro__:
        if "features" in vars(kind):
            return head
        if called in vars(kind):
            return None
    return None


def evaluations(
    denoiser: Denoiser, tokens: Tensor, *, valid: Tensor | None, cond: Condition | None
) -> int | Tensor:
    """The model evaluations that a call on these rows costs: one number, or (B,) int64."""
    of_rows = getattr(denoiser, "row_evaluations", None)
    if of_rows is not None:
        counted: int | Tensor = of_rows(tokens, valid=valid, cond=cond)
        return counted
    return int(getattr(denoiser, "evaluations", 1))


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
        cache: Any = None,
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


# How far a row is on its way from scale 1 to the full scale: (B,) from its hidden share (B,).
Ramp = Callable[[Tensor], Tensor]
RAMPS: dict[str, Ramp | None] = {
    "constant": None,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 - torch.cos(math.pi * (1 - share))) / 2,
}


class Guided:
    """A Denoiser that pushes away from its unconditional branch; see `guided`."""

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        scale: float,
        without: Condition,
        hide: str | None,
        space: TokenSpace | None,
        ramp: Ramp | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.scale = scale
        self.without = without
        self.hide = hide
        self.space = space
        self.ramp = ramp
        self.uses_time = denoiser.uses_time

    @property
    def block_length(self) -> int | None:
        """The blocks of the guided model, None where it has none."""
        length: int | None = getattr(self.denoiser, "block_length", None)
        return length

    @property
    def evaluations(self) -> int:
        """The most model evaluations that a call costs a row: one at scale 1, else two."""
        inner: int = getattr(self.denoiser, "evaluations", 1)
        return inner if self.scale == 1 else 2 * inner

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        """Model evaluations of each row (B,) int64: one branch where its scale is 1, else both."""
        branches = 1 + (self.row_scale(tokens, valid) != 1).long()
        rest = {name: value for name, value in (cond or {}).items() if name != self.hide}
        return branches * evaluations(self.denoiser, tokens, valid=valid, cond=rest or None)

    def row_scale(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """The scale of each row (B,) float64, by the share of its valid places now hidden."""
        if self.ramp is None or self.space is None:
            return torch.full_like(tokens[:, 0], self.scale, dtype=torch.float64)
        hidden = tokens == self.space.mask_id
        seen = torch.ones_like(hidden) if valid is None else valid
        share = (hidden & seen).sum(1).double() / seen.sum(1).clamp(min=1)
        grown = torch.as_tensor(self.ramp(share), device=tokens.device)
        return 1 + (self.scale - 1) * grown.expand(share.shape)

    def __call__(
        self,
        tokens: Tensor,
        *,
        at: Tensor | None = None,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        t: Tensor | None = None,
        cond: Condition | None = None,
        cache: Any = None,
    ) -> Tensor:
        """l_u + s (l_c - l_u), both branches in one batched call, in float32 at least."""
        given, scale, rows = self._split(tokens, valid, cond)
        if len(rows) == 0:
            return self.denoiser(
                tokens, at=at, valid=valid, documents=documents, t=t, cond=given or None,
                cache=cache,
            )  # fmt: skip
        if cache is not None:
            raise ConfigError("guidance with a cache: each branch would need its own")
        twice, condition = self._both(tokens, rows, given, cond)
        both = self.denoiser(
            twice, at=_and_again(at, rows), valid=_and_again(valid, rows),
            documents=_and_again(documents, rows), t=_and_again(t, rows), cond=condition,
        )  # fmt: skip
        both = both if both.dtype == torch.float64 else both.float()
        where = rows
        if at is not None:
            scale, where = _of_asked(at, scale)
        alone, unconditional = both[: len(scale)], both[len(scale) :]
        mixed = guided_logits(alone[where], unconditional, scale[where])
        return alone.index_copy(0, where, mixed)

    def asked_rows(
        self, tokens: Tensor, *, at: Tensor, valid: Tensor | None = None,
        t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """Both branches of the places `at` (B, L), not yet mixed; see `rows_of`."""
        given, scale, rows = self._split(tokens, valid, cond)
        if len(rows) == 0:
            return rows_of(self.denoiser, tokens, at=at, valid=valid, t=t, cond=given or None)
        twice, condition = self._both(tokens, rows, given, cond)
        asked, number = torch.cat([at, at[rows]]), number_of(at)
        if number is not None and len(rows) == len(tokens):
            asked = counted(asked, 2 * number)
        both = rows_of(
            self.denoiser, twice, at=asked, valid=_and_again(valid, rows), t=_and_again(t, rows),
            cond=condition,
        )  # fmt: skip
        if both.unconditional is not None:
            # The branches have branches of their own: mix the inner ones first.
            return Rows(self(tokens, at=at, valid=valid, t=t, cond=cond))
        if len(rows) == len(tokens):
            alone, unconditional = both.conditional.chunk(2)
            scale = scale.repeat_interleave(at.sum(1), output_size=len(alone))
        else:
            scale, where = _of_asked(at, scale)
            alone = both.conditional[: len(scale)]
            unconditional = alone.index_copy(0, where, both.conditional[len(scale) :])
        return Rows(alone, unconditional, scale, both.head)

    def _split(
        self, tokens: Tensor, valid: Tensor | None, cond: Condition | None
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The condition of the first branch, the rows' scales (B,) and which need the other."""
        given = dict(cond or {})
        for name in self.without:
            if name not in given:
                raise ConfigError(f"guidance without {name!r}: {nearest(name, given)}")
        if self.hide is not None:
            given.pop(self.hide, None)
        scale = self.row_scale(tokens, valid)
        if self.ramp is None:
            # One scale for all: known without a look at the device.
            needed = len(tokens) if self.scale != 1 else 0
            return given, scale, torch.arange(needed, device=tokens.device)
        return given, scale, (scale != 1).nonzero()[:, 0]

    def _both(
        self, tokens: Tensor, rows: Tensor, given: dict[str, Tensor], cond: Condition | None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """All rows and then `rows` as the other branch sees them: tokens and condition."""
        blank = tokens[rows]
        if self.hide is not None and self.space is not None:
            hidden = (cond or {}).get(self.hide)
            if hidden is None or hidden.shape != tokens.shape:
                raise ConfigError(
                    f"guidance needs cond[{self.hide!r}] of shape {tuple(tokens.shape)}, got "
                    f"{None if hidden is None else tuple(hidden.shape)}"
                )
            blank = torch.where(hidden[rows], self.space.mask_id, blank)
        free = {
            name: (self.without[name].expand_as(value) if name in self.without else value)[rows]
            for name, value in given.items()
        }
        condition = {name: torch.cat([given[name], free[name]]) for name in given}
        return torch.cat([tokens, blank]), condition or None


def _of_asked(at: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each asked place (N,), and which of them need the other branch."""
    asked = scale[at.nonzero()[:, 0]]
    return asked, (asked != 1).nonzero()[:, 0]


def _and_again(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if tensor is None else torch.cat([tensor, tensor[rows]])


def guided(
    denoiser: Denoiser,
    *,
    guidance_scale: float | None = None,
    cfg_scale: float | None = None,
    without: Condition | None = None,
    hide: str | None = None,
    space: TokenSpace | None = None,
    guidance_schedule: str | Ramp = "constant",
    interval: tuple[float, float] | None = None,
) -> Guided:
    """Classifier-free guidance as a Denoiser: l = l_u + s (l_c - l_u) (Ho & Salimans 2022).

    s = `guidance_scale`: 1 is conditional (and runs one branch), 0 unconditional. The
    literature's w is `cfg_scale` and means s = 1 + w; both at once is an error. What the
    unconditional branch lacks is stated in one or both of two ways: `without` replaces
    entries of `cond` (a null label, say; each value broadcasts over the batch), and `hide`
    names the entry of `cond`, (B, L) bool, whose places are masked (with `space`): guidance
    by masking what is given, which needs no training (Nie et al. 2024, SMDM, section 4).

    With a `guidance_schedule` a row's scale is 1 + (s - 1) g(h), h the share of its valid
    places that are hidden at the call, so that it is the row's own at any batch:

        constant  g = 1
        linear    g = 1 - h: from 1 where all is hidden to s where nothing is, the rising
                  scale of Muse (Chang et al. 2023, section 2.7)
        cosine    g = (1 - cos(pi (1 - h))) / 2, with the same ends: the power-cosine of
                  MaskBit (Weber et al. 2024) and TiTok (Yu et al. 2024) at power 1
        interval  g = 1 where lo < h <= hi, else 0 (Kynkaanniemi et al. 2024, in place of
                  noise levels), `interval` = (lo, hi)

    or a function from h (B,) to g (B,). Those papers count steps where h counts places; given
    places count as revealed. A row whose scale is 1 runs through one branch only.

    Raises ConfigError where neither scale is given or they are not one finite number, and for
    an unknown schedule, one without `space`, or an interval outside [0, 1].
    """
    if (guidance_scale is None) == (cfg_scale is None):
        raise ConfigError("guided: give guidance_scale or cfg_scale, exactly one of the two")
    scale = guidance_scale if guidance_scale is not None else 1.0 + float(cfg_scale or 0.0)
    if not math.isfinite(scale):
        raise ConfigError(f"guidance_scale={scale}: expected a finite number")
    if not without and hide is None:
        raise ConfigError("guided: say what the other branch lacks, by without= or hide=")
    if hide is not None and space is None:
        raise ConfigError("guided: hide= needs the space, for its mask id")
    ramp = _ramp(guidance_schedule, interval)
    if ramp is not None and space is None:
        raise ConfigError("guided: guidance_schedule= needs the space, for its mask id")
    return Guided(
        denoiser, scale=scale, without=without or {}, hide=hide, space=space, ramp=ramp
    )  # fmt: skip


def _ramp(schedule: str | Ramp, interval: tuple[float, float] | None) -> Ramp | None:
    """The g(h) of `guided`; None where it is 1 throughout."""
    if (schedule == "interval") != (interval is not None):
        raise ConfigError("guided: guidance_schedule='interval' and interval=(lo, hi) go together")
    if interval is not None:
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ConfigError(f"interval={interval}: expected (lo, hi) with 0 <= lo < hi <= 1")
        lo, hi = interval
        return lambda share: ((share > lo) & (share <= hi)).double()
    if callable(schedule):
        return schedule
    if schedule not in RAMPS:
        known = [*RAMPS, "interval"]
        raise ConfigError(f"unknown guidance schedule {schedule!r}; {nearest(schedule, known)}")
    return RAMPS[schedule]
