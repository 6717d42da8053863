"""The parts of a training run, built once from a recipe."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mdiff.denoiser import Denoiser, Saveable
from mdiff.errors import ConfigError, MdiffError
from mdiff.files import meant
from mdiff.find import find
from mdiff.kernels import philox
from mdiff.modalities import Conditional, HasLayout, HasParts, Modality
from mdiff.objective import GivenParts, refuse_blocks
from mdiff.process import Masking, Process, named_process
from mdiff.process_state import kept_generators
from mdiff.schedule import named_schedule
from mdiff.tokens import Examples, TokenSpace
from mdiff.training.batches import StepRows
from mdiff.training.optim import AveragedWeights, optimizers
from mdiff.training.recipe import Part, Recipe
from mdiff.training.state import parameters
from mdiff.training.step import LossOf, Stepper

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}

Built = TypeVar("Built")


@dataclass(frozen=True)
class Run:
    """Everything that the loop needs, built once."""

    recipe: Recipe
    accelerator: Accelerator
    modality: Modality
    examples: Examples
    space: TokenSpace
    backbone: nn.Module
    optimizers: list[torch.optim.Optimizer]
    averaged: AveragedWeights | None
    rows: StepRows
    stepper: Stepper


def build_run(recipe: Recipe, accelerator: Accelerator, source: Path | None = None) -> Run:
    """The parts of a run, the model with its initial weights by the seed.

    What the modality reads of a path that is gone is taken from `source`, the checkpoint to resume.
    """
    process = process_of(recipe)
    modality = _modality(recipe.modality, source)
    # The first process prepares what is cached, the others then read it.
    with accelerator.main_process_first():
        examples = modality.examples(recipe.data.options, length=recipe.data.length, split="train")
    rank, world = accelerator.process_index, accelerator.num_processes
    rows = StepRows(examples, train=recipe.train, rank=rank, world=world)
    for _, batch in rows[1]:
        modality.space.check(batch.tokens, batch.valid, masks=False)
    loss_of = _loss(recipe, modality, examples, process)
    made = optimizers(loss_of, recipe.optim)
    prepared, *stepped = accelerator.prepare(loss_of, *made)
    backbone = accelerator.unwrap_model(prepared).backbone
    if recipe.train.compile:
        backbone.compile()
    # Inside accelerate's: their states are saved.
    plain = [o.optimizer if isinstance(o, AcceleratedOptimizer) else o for o in stepped]
    decay = recipe.train.ema
    averaged = None if decay is None else AveragedWeights(parameters(backbone), decay=decay)
    return Run(
        recipe, accelerator, modality, examples, modality.space, backbone, plain, averaged,
        rows, Stepper(accelerator, prepared, rows, stepped, averaged, recipe),
    )  # fmt: skip


@dataclass(frozen=True)
class Size:
    """The parameters of a recipe's model, how many of them are embeddings, and tokens a step.

    Embeddings are the weights of `nn.Embedding`s (of tokens, positions and labels) and what is
    tied to them. Tokens are positions of rows, padding included. `data` and `unit` are those of
    the examples.
    """

    parameters: int
    embeddings: int
    tokens: int
    data: str
    unit: str


def medium_of(recipe: Recipe) -> tuple[Modality, Examples]:
    """The modality of a recipe and its rows to train on; raises as `train` does."""
    modality = _modality(recipe.modality, None)
    options = recipe.data.options
    return modality, modality.examples(options, length=recipe.data.length, split="train")


@kept_generators()
def size_of(recipe: Recipe, modality: Modality, examples: Examples) -> Size:
    """The size of a recipe's model, which is built for it; raises as `train` does."""
    module = _loss(recipe, modality, examples, process_of(recipe))
    embeddings = {
        id(weight)
        for layer in module.modules()
        if isinstance(layer, nn.Embedding)
        for weight in layer.parameters()
    }
    counts = {id(weight): weight.numel() for weight in module.parameters()}
    return Size(
        sum(counts.values()), sum(counts[each] for each in embeddings),
        recipe.train.batch_size * examples.length, examples.fingerprint, examples.unit,
    )  # fmt: skip


def _modality(part: Part, source: Path | None) -> Modality:
    """The modality of a recipe, or that of the checkpoint where it cannot be made again."""
    build: Callable[..., Modality] = find("modalities", part.name)
    try:
        return _part(build, part)
    except MdiffError:
        if source is None or "folder" not in signature(build).parameters:
            raise
        with suppress(MdiffError):
            return _part(build, part, folder=source)
        raise


def process_of(recipe: Recipe) -> Process:
    """The noise of a recipe, on its schedule."""
    objective = recipe.objective
    schedule = named_schedule(objective.schedule.name, **objective.schedule.options)
    if objective.process is None:
        return Masking(schedule)
    return named_process(objective.process.name, schedule, **objective.process.options)


def _loss(recipe: Recipe, modality: Modality, examples: Examples, process: Process) -> LossOf:
    """The backbone with its initial weights, and the objective."""
    space = modality.space
    torch.manual_seed(int(philox.derive(recipe.train.seed)))
    of_medium = (
        {"layout": modality.layout, "classes": modality.classes}
        if isinstance(modality, HasLayout) else {}
    )  # fmt: skip
    backbone: nn.Module = _part(
        find("backbones", recipe.model.name), recipe.model, section="model",
        vocab_size=space.vocab_size, mask_id=space.mask_id, max_length=examples.length,
        **{name: value for name, value in of_medium.items() if value},
    )  # fmt: skip
    if not isinstance(backbone, Denoiser) or not isinstance(backbone, Saveable):
        raise ConfigError(
            f"model {recipe.model.name!r}: expected a Denoiser with `uses_time` and "
            "`save_pretrained`, see docs/adding-a-part.md"
        )
    refuse_blocks(backbone)
    if not isinstance(process, Masking):
        posterior = recipe.objective.weight == "cross_entropy"
        vars(backbone)["predicts"] = "posterior" if posterior else "leave_one_out"
    backbone.to(DTYPES[recipe.train.precision]).train()
    given = None
    if recipe.objective.given is not None:
        names = modality.part_names if isinstance(modality, HasParts) else ()
        given = GivenParts.of(recipe.objective.given, space=space, part_names=names)
    null = modality.null_condition if isinstance(modality, Conditional) else {}
    return LossOf(backbone, recipe, space=space, process=process, null_condition=null, given=given)


def _part(
    build: Callable[..., Built], part: Part, *, section: str = "modality", **given: object
) -> Built:
    """A part of a recipe with its options, and those of the `given` ones that it takes.

    Raises ConfigError for an option that it does not take, or that the data decides.
    """
    options, parameters = part.options, signature(build).parameters
    if not any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        given = {key: value for key, value in given.items() if key in parameters}
        for key in options:
            if key not in parameters:
                where = meant(f"{section}.{key}", [f"{section}.{k}" for k in parameters])
                raise ConfigError(f"unknown key '{section}.{key}' of {part.name!r}; {where}")
    for key in options.keys() & given.keys():
        if options[key] != given[key]:
            raise ConfigError(f"{section}.{key}={options[key]!r}: the data gives {given[key]!r}")
    try:
        return build(**(given | options))
    except MdiffError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{section} {part.name!r} with {options}: {error}") from error
