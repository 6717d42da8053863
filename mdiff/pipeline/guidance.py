"""Guidance as it is asked for: how hard it pushes, and away from what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mdiff.denoiser import Denoiser, away_from, guided, other_start
from mdiff.errors import ConfigError, DataError
from mdiff.modalities import Conditional, HasParts, Modality, TextConditional
from mdiff.tokens import TokenSpace

# The entry of `cond` that guidance reads: the places which the other branch hides.
GIVEN = "given"
# A prompt is a text, or a mapping of what is given by name.
Prompt = str | Mapping[str, Any]
# What of a batch, its canvas (B, L) and its valid places, the denoiser is told for guidance.
Told = Callable[[Tensor, Tensor | None], dict[str, Tensor]]


class Model(Protocol):
    """What guidance asks of a pipeline."""

    @property
    def denoiser(self) -> Denoiser:
        """The model itself."""

    @property
    def space(self) -> TokenSpace:
        """Its ids."""

    @property
    def modality(self) -> Modality:
        """What its ids mean."""

    @property
    def window(self) -> int | None:
        """The length it was trained on."""

    @property
    def device(self) -> torch.device:
        """Where it takes its tokens."""


@dataclass(frozen=True)
class Push:
    """`scale`, `schedule` and `interval` of `denoiser.guided`; None is no guidance at all.

    The branch that it pushes away from has the prompt hidden or, of a model that is told
    something, is told nothing; with a `negative` prompt it is told, or begins with, that one.
    """

    scale: float | None = None
    schedule: str = "constant"
    interval: tuple[float, float] | None = None
    negative: Prompt | None = None

    def on(self, model: Model, canvases: Sequence[Sequence[int]]) -> tuple[Denoiser, Told]:
        """The denoiser with its guidance, and what of a batch of `canvases` it is to be told.

        Raises ConfigError or DataError for what this model cannot be pushed away from.
        """
        if self.scale is None:
            if self != Push():
                raise ConfigError(
                    "guidance_schedule, guidance_interval and negative need a guidance_scale"
                )
            return model.denoiser, lambda canvas, valid: {}
        options: dict[str, Any] = {
            "guidance_scale": self.scale, "guidance_schedule": self.schedule,
            "interval": self.interval, "space": model.space,
        }  # fmt: skip
        if self.negative is not None and not isinstance(model.modality, TextConditional):
            start = _start(model, self.negative, canvases)
            away = away_from(model.denoiser, device=model.device, **options)
            return away, lambda canvas, valid: other_start(
                canvas, start, valid=valid, space=model.space
            )
        without = told_without(model.modality, self.negative)
        if without:
            options["without"] = {name: told.to(model.device) for name, told in without.items()}
            return guided(model.denoiser, **options), lambda canvas, valid: {}
        hiding = guided(model.denoiser, hide=GIVEN, **options)
        return hiding, lambda canvas, valid: {GIVEN: canvas != model.space.mask_id}


def told_without(modality: Modality, negative: Prompt | None) -> dict[str, Tensor]:
    """What the other branch of guidance is told, (1, ...); empty where there is no telling."""
    if negative is not None and isinstance(modality, TextConditional):
        if not isinstance(negative, str):
            raise ConfigError(f"negative={negative!r:.60}: expected a text")
        return modality.encode_condition(negative)
    return modality.null_condition if isinstance(modality, Conditional) else {}


def _start(model: Model, negative: Prompt, canvases: Sequence[Sequence[int]]) -> Tensor:
    """The tokens (N,) of a negative prompt, which fits before what is to be drawn."""
    if not negative or isinstance(model.modality, HasParts) or hasattr(model.denoiser, "cells"):
        raise ConfigError(
            "negative: expected what a text begins with; guidance without it hides the prompt"
        )
    start = torch.tensor(model.modality.canvas(negative), device=model.device)
    model.space.check(start[None], None)
    longest = max((list(one).count(model.space.mask_id) for one in canvases), default=0)
    if model.window is not None and len(start) + longest > model.window:
        raise DataError(
            f"negative: {len(start)} tokens before {longest} that are drawn are more than "
            f"the model's window of {model.window}"
        )
    return start
