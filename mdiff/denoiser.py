"""The one contract of a model: a canvas goes in, logits of the clean tokens come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mdiff.errors import ConfigError, nearest
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
        return 1 + (self.scale - 1) * torch.as_tensor(self.ramp(share)).expand(share.shape)

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
        given = dict(cond or {})
        for name in self.without:
            if name not in given:
                raise ConfigError(f"guidance without {name!r}: {nearest(name, given)}")
        hidden = given.pop(self.hide, None) if self.hide is not None else None
        scale = self.row_scale(tokens, valid)
        # The rows that need the other branch too.
        rows = (scale != 1).nonzero()[:, 0]
        if len(rows) == 0:
            return self.denoiser(
                tokens, at=at, valid=valid, documents=documents, t=t, cond=given or None,
                cache=cache,
            )  # fmt: skip
        if cache is not None:
            raise ConfigError("guidance with a cache: each branch would need its own")
        blank = tokens[rows]
        if self.hide is not None and self.space is not None:
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
        both = self.denoiser(
            torch.cat([tokens, blank]),
            at=_and_again(at, rows),
            valid=_and_again(valid, rows),
            documents=_and_again(documents, rows),
            t=_and_again(t, rows),
            cond={name: torch.cat([given[name], free[name]]) for name in given} or None,
        )
        both = both if both.dtype == torch.float64 else both.float()
        return self._mixed(both, rows, scale, at)

    def _mixed(self, both: Tensor, rows: Tensor, scale: Tensor, at: Tensor | None) -> Tensor:
        """The guided logits, from those of all rows and, behind them, of `rows` once more."""
        where = rows
        if at is not None:
            row = at.nonzero()[:, 0]
            scale, where = scale[row], torch.isin(row, rows).nonzero()[:, 0]
        alone, unconditional = both[: len(scale)], both[len(scale) :]
        conditional = alone[where]
        s = scale[where].to(both.dtype).view(-1, *[1] * (both.dim() - 1))
        mixed = unconditional + s * (conditional - unconditional)
        # -inf - -inf has no value, but an id that both branches exclude is excluded.
        excluded = (conditional == -torch.inf) & (unconditional == -torch.inf)
        return alone.index_copy(0, where, mixed.masked_fill(excluded, -torch.inf))


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
