"""The parts of a training run, built once from a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from mdiff.errors import ConfigError, MdiffError, nearest
from mdiff.find import find
from mdiff.kernels import philox
from mdiff.modalities import Conditional, HasLayout, HasParts, Modality
from mdiff.objective import GivenParts
from mdiff.schedule import Schedule, named_schedule
from mdiff.tokens import Examples, TokenSpace
from mdiff.training.optim import AveragedWeights, optimizers
from mdiff.training.recipe import Recipe
from mdiff.training.state import Placement, TorchPlacement
from mdiff.training.step import LossOf, Stepper, StepRows
from mdiff.training.zero import ZeroAccelerator, refuse

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Run:
    """Everything that the loop needs, built once."""

    recipe: Recipe
    accelerator: Accelerator
    modality: Modality
    examples: Examples
    space: TokenSpace
    schedule: Schedule
    backbone: nn.Module
    placement: Placement
    averaged: AveragedWeights | None
    rows: StepRows
    stepper: Stepper


def build_run(recipe: Recipe, accelerator: Accelerator) -> Run:
    """The parts of a run, the model with its initial weights by the seed."""
    if isinstance(accelerator, ZeroAccelerator):
        refuse(recipe.train)
    objective = recipe.objective
    schedule = named_schedule(objective.schedule.name, **objective.schedule.options)
    modality: Modality = _part("modalities", recipe.modality.name, recipe.modality.options)
    # The first process prepares what is cached, the others then read it.
    with accelerator.main_process_first():
        examples = modality.examples(recipe.data.options, length=recipe.data.length, split="train")
    space = modality.space
    rows = StepRows(
        examples,
        train=recipe.train,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    for _, batch in rows[1]:
        space.check(batch.tokens, batch.valid, masks=False)
    torch.manual_seed(int(philox.derive(recipe.train.seed)))
    backbone = _part(
        "backbones",
        recipe.model.name,
        recipe.model.options,
        vocab_size=space.vocab_size,
        mask_id=space.mask_id,
        max_length=examples.length,
        **_of_medium(modality),
    )
    backbone.to(DTYPES[recipe.train.precision]).train()
    given = None
    if objective.given is not None:
        names = modality.part_names if isinstance(modality, HasParts) else ()
        given = GivenParts.of(objective.given, space=space, part_names=names)
    loss_of = LossOf(
        backbone, recipe, space=space, schedule=schedule, given=given,
        without=modality.null_condition if isinstance(modality, Conditional) else None,
    )  # fmt: skip
    made = optimizers(backbone, recipe.optim)
    loss_of, *prepared = accelerator.prepare(loss_of, *made)
    backbone = accelerator.unwrap_model(loss_of).backbone
    if recipe.train.compile:
        backbone.compile()
    placement = _placement(accelerator, backbone, prepared)
    decay = recipe.train.ema
    averaged = None if decay is None else AveragedWeights(placement.parts(), decay=decay)
    return Run(
        recipe, accelerator, modality, examples, space, schedule, backbone, placement, averaged,
        rows, Stepper(accelerator, loss_of, placement, prepared, averaged, recipe),
    )  # fmt: skip


def _placement(accelerator: Accelerator, backbone: nn.Module, prepared: list[Any]) -> Placement:
    """Where the accelerator put the parameters, and their optimisers' states."""
    if isinstance(accelerator, ZeroAccelerator):
        return accelerator.placement(backbone)
    return TorchPlacement(backbone, [getattr(o, "optimizer", o) for o in prepared])


def _of_medium(modality: Modality) -> dict[str, Any]:
    """The options of a backbone that its modality sets."""
    if not isinstance(modality, HasLayout):
        return {}
    found = {"layout": modality.layout, "classes": modality.classes}
    return {name: value for name, value in found.items() if value}


def _part(room: str, name: str, options: dict[str, Any], **given: Any) -> Any:
    """The part of that name with its options, and what is `given` and it knows.

    Raises ConfigError for an option that it does not know, or that the data decides.
    """
    build = find(room, name)
    section = "model" if room == "backbones" else "modality"
    parameters = signature(build).parameters
    if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        given = {key: value for key, value in given.items() if key in parameters}
        for key in options:
            if key not in parameters:
                where = nearest(f"{section}.{key}", [f"{section}.{k}" for k in parameters])
                raise ConfigError(f"unknown key '{section}.{key}' of {name!r}; {where}")
    for key in options.keys() & given.keys():
        if options[key] != given[key]:
            raise ConfigError(f"{section}.{key}={options[key]!r}: the data gives {given[key]!r}")
    try:
        return build(**(given | options))
    except MdiffError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section} {name!r} with {options}: {error}") from error
