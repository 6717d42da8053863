"""Classifier-free guidance of a loaded model: its scale, and its unconditional branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.backbones.layers import GridModel
from mdiff.denoiser import Denoiser, guided, negative_prompt
from mdiff.errors import ConfigError, DataError
from mdiff.modalities import Conditional, HasParts, Modality, TextConditional
from mdiff.pipeline.options import CallOptions, Model, Prompt

# The entry of `cond` that guidance reads: the positions that the unconditional branch hides.
GIVEN = "given"
# From a batch's canvas (B, L) and its valid positions to its guided denoiser and the entries of
# `cond` that this reads.
Guidance = Callable[[Tensor, Tensor | None], tuple[Denoiser, dict[str, Tensor]]]


@dataclass(frozen=True)
class GuidanceOptions:
    """`scale`, `schedule` and `interval` of `denoiser.guided`; a scale of None is no guidance.

    The unconditional branch has the null condition or, where the model takes none, the prompt
    hidden. A `negative` prompt replaces the condition or the prompt there.
    """

    scale: float | None = None
    schedule: str = "constant"
    interval: tuple[float, float] | None = None
    negative: Prompt | None = None

    @classmethod
    def of(cls, options: CallOptions) -> GuidanceOptions:
        """The options of guidance, taken out of those of a call."""
        negative, old = options.pop("negative_prompt", None), options.pop("negative", None)
        if negative is not None and old is not None:
            raise ConfigError("negative_prompt and negative are the same: give one of them")
        return cls(
            options.pop("guidance_scale", None),
            options.pop("guidance_schedule", "constant"),
            options.pop("guidance_interval", None),
            old if negative is None else negative,
        )

    def check_effect(
        self, model: Model, canvases: Sequence[Sequence[int]],
        conditions: Sequence[Mapping[str, int | Tensor]], conditional: bool,
    ) -> None:  # fmt: skip
        """Raise ConfigError where both branches are the same in every row, at twice the calls.

        They are where no row of a `conditional` model has a condition and where, of another
        model, no row gives a token.
        """
        if self.scale is None or (self.negative is not None and not conditional):
            return
        if conditional:
            has_effect, wanted = any(conditions), ", ".join(null_condition(model.modality))
        else:
            mask = model.space.mask_id
            has_effect = self.scale == 1 or any(token != mask for row in canvases for token in row)
            parts = model.modality.part_names if isinstance(model.modality, HasParts) else ()
            wanted = " or ".join(parts) or "a prompt"
        if not has_effect:
            raise ConfigError(f"guidance_scale without a condition has no effect: give {wanted}")

    def bind(self, model: Model, canvases: Sequence[Sequence[int]]) -> Guidance:
        """What gives each batch of `canvases` its guided denoiser and entries of `cond`.

        Raises ConfigError or DataError for a negative prompt that this model cannot take.
        """
        if self.scale is None:
            if self != GuidanceOptions():
                raise ConfigError(
                    "guidance_schedule, guidance_interval and negative_prompt need a guidance_scale"
                )
            return lambda canvas, valid: (model.denoiser, {})
        base, space, device = model.denoiser, model.space, model.device
        scale, schedule, interval = self.scale, self.schedule, self.interval
        if self.negative is not None and not isinstance(model.modality, TextConditional):
            start = _start(model, self.negative, canvases)
            bound = negative_prompt(
                base, start, space=space, guidance_scale=scale, guidance_schedule=schedule,
                interval=interval,
            )  # fmt: skip
            return lambda canvas, valid: (bound(canvas, valid), {})
        null = null_condition(model.modality, self.negative)
        denoiser = guided(
            base, guidance_scale=scale, guidance_schedule=schedule, interval=interval, space=space,
            without={name: value.to(device) for name, value in null.items()},
            hide=None if null else GIVEN,
        )  # fmt: skip
        return lambda canvas, valid: (denoiser, {} if null else {GIVEN: canvas != space.mask_id})


def null_condition(modality: Modality, negative: Prompt | None = None) -> dict[str, Tensor]:
    """The condition (1, ...) of the unconditional branch; empty for a model without conditions."""
    if negative is not None and isinstance(modality, TextConditional):
        if not isinstance(negative, str):
            raise ConfigError(f"negative_prompt={negative!r:.60}: expected a text")
        return modality.encode_condition(negative)
    return modality.null_condition if isinstance(modality, Conditional) else {}


def _start(model: Model, negative: Prompt, canvases: Sequence[Sequence[int]]) -> Tensor:
    """The tokens (N,) of a negative prompt, which fit in front of the hidden positions."""
    has_grid = isinstance(model.modality, HasParts) or isinstance(model.denoiser, GridModel)
    if not negative or has_grid:
        raise ConfigError(
            "negative_prompt: expected the beginning of a text; without it the prompt is hidden"
        )
    start = torch.tensor(model.modality.canvas(negative), device=model.device)
    model.space.check(start[None], None)
    longest = max((list(one).count(model.space.mask_id) for one in canvases), default=0)
    if model.window is not None and len(start) + longest > model.window:
        raise DataError(
            f"negative_prompt: {len(start)} tokens before {longest} hidden ones are more than "
            f"the model's window of {model.window}"
        )
    return start
