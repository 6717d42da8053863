"""Classifier-free guidance as a Denoiser."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mdiff.denoiser.calls import (
    asks_rows,
    block_length_of,
    corrects,
    evaluations,
    fixed_evaluations,
    has_shadows,
    row_request,
    seeds_blocks,
    shadow_request,
)
from mdiff.denoiser.protocol import Cache, Condition, Denoiser, RowBound, Rows
from mdiff.denoiser.strength import Ramp, Strength, strength_of
from mdiff.errors import ConfigError, nearest
from mdiff.kernels.reference import guided_logits
from mdiff.tokens import TokenSpace


class Call(NamedTuple):
    """What a model is called with: a batch, and behind it some of its rows as the other branch."""

    tokens: Tensor
    at: Tensor | None
    valid: Tensor | None
    cond: Condition | None


class Guided:
    """A Denoiser that mixes the logits of two branches of another; see `guided`."""

    def __init__(
        self,
        denoiser: Denoiser,
        strength: Strength,
        *,
        without: Condition | None = None,
        hide: str | None = None,
        mask_id: int = 0,
    ) -> None:
        """`mask_id` is what stands at the positions of `hide` in the other branch."""
        if isinstance(denoiser, RowBound):
            raise ConfigError("guidance of a denoiser that is bound to rows: guide its own model")
        self.denoiser, self.strength = denoiser, strength
        self.without, self.hide, self.mask_id = without or {}, hide, mask_id
        self.uses_time = denoiser.uses_time

    @property
    def block_length(self) -> int | None:
        """The blocks of the guided model, None where it has none."""
        return block_length_of(self.denoiser)

    @property
    def corrects(self) -> bool:
        """Whether the guided model was trained to correct tokens that it is shown."""
        return corrects(self.denoiser)

    @property
    def block_seed(self) -> bool:
        """Whether the guided model takes a block's first token from the block before."""
        return seeds_blocks(self.denoiser)

    @property
    def evaluations(self) -> int:
        """The most model evaluations that a call costs a row: one at scale 1, else two."""
        inner = fixed_evaluations(self.denoiser)
        return inner if self.strength.scale == 1 else 2 * inner

    def row_evaluations(
        self, tokens: Tensor, *, valid: Tensor | None = None, cond: Condition | None = None
    ) -> Tensor:
        """Model evaluations of each row (B,) int64: one branch where its scale is 1, else both."""
        branches = 1 + (self.strength.of_rows(tokens, valid) != 1).long()
        rest = {name: value for name, value in (cond or {}).items() if name != self.hide}
        return branches * evaluations(self.denoiser, tokens, valid=valid, cond=rest or None)

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
        scale, rows = self._branches(tokens, valid)
        if len(rows) and cache is not None:
            raise ConfigError("guidance with a cache: each branch would need its own")
        call = self.call(tokens, rows, at=at, valid=valid, cond=cond)
        both = self.denoiser(
            call.tokens, at=call.at, valid=call.valid, documents=and_again(documents, rows),
            t=and_again(t, rows), cond=call.cond, cache=cache,
        )  # fmt: skip
        if len(rows) == 0:
            return both
        both = both if both.dtype == torch.float64 else both.float()
        where = rows
        if at is not None:
            scale, where = _of_requested(at, scale)
        alone, unconditional = both[: len(scale)], both[len(scale) :]
        mixed = guided_logits(alone[where], unconditional, scale[where])
        return alone.index_copy(0, where, mixed)

    def has_shadows(self) -> bool:
        """Whether the guided model, if it is no wrapper itself, gives rows by shadows."""
        return has_shadows(self.denoiser) and not asks_rows(self.denoiser)

    def shadow_rows(
        self, tokens: Tensor, *, at: Tensor, mask_id: int, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
    ) -> Rows:  # fmt: skip
        """Both branches of the positions `at`, those of tokens by their shadows, not yet mixed."""
        return self.requested_rows(
            tokens, at=at, number=number, valid=valid, t=t, cond=cond, mask_id=mask_id
        )

    def requested_rows(
        self, tokens: Tensor, *, at: Tensor, number: int | None = None,
        valid: Tensor | None = None, t: Tensor | None = None, cond: Condition | None = None,
        mask_id: int | None = None,
    ) -> Rows:  # fmt: skip
        """Both branches of the positions `at` (B, L), not yet mixed; see `row_request`.

        With the `mask_id`, the rows of tokens are those of their shadows.
        """
        scale, rows = self._branches(tokens, valid)
        call = self.call(tokens, rows, at=at, valid=valid, cond=cond)
        everyone = len(rows) == len(tokens)
        if number is not None and len(rows):
            number = 2 * number if everyone else None
        # Looked up at each call: the model may have got a hook since the last one.
        ask = row_request(self.denoiser)
        if mask_id is not None:
            ask = partial(shadow_request(self.denoiser), mask_id=mask_id)
        both = ask(
            call.tokens, at=call.at, number=number, valid=call.valid, t=and_again(t, rows),
            cond=call.cond,
        )  # fmt: skip
        if len(rows) == 0:
            return both
        if both.unconditional is not None:
            # The branches have branches of their own: mix the inner ones first.
            return Rows(self(tokens, at=at, valid=valid, t=t, cond=cond))
        if everyone:
            alone, unconditional = both.conditional.chunk(2)
            scale = scale.repeat_interleave(at.sum(1), output_size=len(alone))
        else:
            scale, where = _of_requested(at, scale)
            alone = both.conditional[: len(scale)]
            unconditional = alone.index_copy(0, where, both.conditional[len(scale) :])
        return Rows(alone, unconditional, scale, both.head)

    def call(
        self, tokens: Tensor, rows: Tensor, *, at: Tensor | None, valid: Tensor | None,
        cond: Condition | None,
    ) -> Call:  # fmt: skip
        """The call of the model on all rows and then on `rows` (R,) as the other branch."""
        given = dict(cond or {})
        for name in self.without:
            if name not in given:
                raise ConfigError(f"guidance without {name!r}: {nearest(name, given)}")
        hidden = None if self.hide is None else given.pop(self.hide, None)
        if len(rows) == 0:
            return Call(tokens, at, valid, given or None)
        again = tokens[rows]
        if self.hide is not None:
            if hidden is None or hidden.shape != tokens.shape:
                shape = None if hidden is None else tuple(hidden.shape)
                raise ConfigError(
                    f"guidance needs cond[{self.hide!r}] {tuple(tokens.shape)}, got {shape}"
                )
            again = torch.where(hidden[rows], self.mask_id, again)
        condition = {
            name: torch.cat([value, self.without.get(name, value).expand_as(value)[rows]])
            for name, value in given.items()
        }
        return Call(
            torch.cat([tokens, again]), and_again(at, rows), and_again(valid, rows),
            condition or None,
        )  # fmt: skip

    def _branches(self, tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """The scale of each row (B,), and the rows (R,) that need the other branch."""
        scale = self.strength.of_rows(tokens, valid)
        if self.strength.ramp is None:
            # One scale for all: known without a host-device synchronisation.
            needed = len(tokens) if self.strength.scale != 1 else 0
            return scale, torch.arange(needed, device=tokens.device)
        return scale, (scale != 1).nonzero()[:, 0]


def _of_requested(at: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each requested row (N,), and which of them need the other branch."""
    requested = scale[at.nonzero()[:, 0]]
    return requested, (requested != 1).nonzero()[:, 0]


def and_again(tensor: Tensor | None, rows: Tensor) -> Tensor | None:
    """The tensor (B, ...) with its `rows` (R,) behind it, (B + R, ...)."""
    return tensor if tensor is None or len(rows) == 0 else torch.cat([tensor, tensor[rows]])


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
    names the entry of `cond`, (B, L) bool, whose positions are masked (with `space`): guidance
    by masking what is given, which needs no training (Nie et al. 2024, SMDM, section 4).

    With a `guidance_schedule` a row's scale is 1 + (s - 1) g(h), h the share of its valid
    positions that are hidden at the call, so that it is the row's own at any batch:

        constant  g = 1
        linear    g = 1 - h: from 1 where all is hidden to s where nothing is, the rising
                  scale of Muse (Chang et al. 2023, section 2.7)
        cosine    g = (1 - cos(pi (1 - h))) / 2, with the same ends: the power-cosine of
                  MaskBit (Weber et al. 2024) and TiTok (Yu et al. 2024) at power 1
        interval  g = 1 where lo < h <= hi, else 0 (Kynkaanniemi et al. 2024, instead of
                  noise levels), `interval` = (lo, hi)

    or a function from h (B,) to g (B,). Those papers count steps where h counts positions;
    given positions count as revealed. A row whose scale is 1 runs through one branch only.

    Raises ConfigError where neither scale is given or both are, for one beyond LARGEST_SCALE, an
    unknown schedule, one without `space`, or an interval outside [0, 1].
    """
    strength = strength_of(guidance_scale, cfg_scale, guidance_schedule, interval, space)
    if not without and hide is None:
        raise ConfigError("guided: say what the other branch lacks, by without= or hide=")
    if hide is not None and space is None:
        raise ConfigError("guided: hide= needs the space, for its mask id")
    mask_id = 0 if space is None else space.mask_id
    return Guided(denoiser, strength, without=without, hide=hide, mask_id=mask_id)
