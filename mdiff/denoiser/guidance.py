"""Classifier-free guidance as a Denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mdiff.denoiser.protocol import (
    Cache,
    Condition,
    Denoiser,
    Rows,
    block_length_of,
    evaluations,
    fixed_evaluations,
    row_request,
)
from mdiff.errors import ConfigError, nearest
from mdiff.kernels.reference import guided_logits
from mdiff.tokens import TokenSpace

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
        return block_length_of(self.denoiser)

    @property
    def evaluations(self) -> int:
        """The most model evaluations that a call costs a row: one at scale 1, else two."""
        inner = fixed_evaluations(self.denoiser)
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
        cache: Cache | None = None,
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

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """Both branches of the positions `at` (B, L), not yet mixed; see `row_request`."""
        given, scale, rows = self._split(tokens, valid, cond)
        request = row_request(self.denoiser)
        if len(rows) == 0:
            return request(tokens, at=at, number=number, valid=valid, t=t, cond=given or None)
        twice, condition = self._both(tokens, rows, given, cond)
        if number is not None:
            number = 2 * number if len(rows) == len(tokens) else None
        both = request(
            twice, at=torch.cat([at, at[rows]]), number=number,
            valid=_and_again(valid, rows), t=_and_again(t, rows), cond=condition,
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
