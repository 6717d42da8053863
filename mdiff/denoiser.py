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
    costs each row (1 where absent, 2 where guided).
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
    ) -> None:
        self.denoiser = denoiser
        self.scale = scale
        self.without = without
        self.hide = hide
        self.space = space
        self.uses_time = denoiser.uses_time

    @property
    def evaluations(self) -> int:
        """Model evaluations a call: one at scale 1, else both branches."""
        inner: int = getattr(self.denoiser, "evaluations", 1)
        return inner if self.scale == 1 else 2 * inner

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
        if self.scale == 1:
            return self.denoiser(
                tokens, at=at, valid=valid, documents=documents, t=t, cond=given or None,
                cache=cache,
            )  # fmt: skip
        if cache is not None:
            raise ConfigError("guidance with a cache: each branch would need its own")
        blank = tokens
        if self.hide is not None and self.space is not None:
            if hidden is None or hidden.shape != tokens.shape:
                raise ConfigError(
                    f"guidance needs cond[{self.hide!r}] of shape {tuple(tokens.shape)}, got "
                    f"{None if hidden is None else tuple(hidden.shape)}"
                )
            blank = torch.where(hidden, self.space.mask_id, tokens)
        free = {
            name: self.without[name].expand_as(value) if name in self.without else value
            for name, value in given.items()
        }
        both = self.denoiser(
            torch.cat([tokens, blank]),
            at=_twice(at),
            valid=_twice(valid),
            documents=_twice(documents),
            t=_twice(t),
            cond={name: torch.cat([given[name], free[name]]) for name in given} or None,
        )
        both = both if both.dtype == torch.float64 else both.float()
        conditional, unconditional = both.chunk(2)
        mixed = unconditional + self.scale * (conditional - unconditional)
        # -inf - -inf has no value, but an id that both branches exclude is excluded.
        excluded = (conditional == -torch.inf) & (unconditional == -torch.inf)
        return mixed.masked_fill(excluded, -torch.inf)


def _twice(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.cat([tensor, tensor])


def guided(
    denoiser: Denoiser,
    *,
    guidance_scale: float | None = None,
    cfg_scale: float | None = None,
    without: Condition | None = None,
    hide: str | None = None,
    space: TokenSpace | None = None,
) -> Guided:
    """Classifier-free guidance as a Denoiser: l = l_u + s (l_c - l_u) (Ho & Salimans 2022).

    s = `guidance_scale`: 1 is conditional (and runs one branch), 0 unconditional. The
    literature's w is `cfg_scale` and means s = 1 + w; both at once is an error. What the
    unconditional branch lacks is stated in one or both of two ways: `without` replaces
    entries of `cond` (a null label, say; each value broadcasts over the batch), and `hide`
    names the entry of `cond`, (B, L) bool, whose places are masked (with `space`): guidance
    by masking what is given, which needs no training (Nie et al. 2024, SMDM, section 4).

    Raises ConfigError where neither is given or the scales are not one finite number.
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
    return Guided(denoiser, scale=scale, without=without or {}, hide=hide, space=space)
