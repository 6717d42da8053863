"""Run a sampler to its end: names become objects here, and one sample's figures are added up."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser, block_length_of
from mdiff.errors import ConfigError, MdiffError, nearest
from mdiff.find import find
from mdiff.sampling.unmasking import State
from mdiff.schedule import named_schedule
from mdiff.tokens import TokenSpace

Sampler = Callable[..., Iterator[State]]
Seed = int | Tensor | torch.Generator | Sequence[torch.Generator]

# What `sample` hands to every sampler itself.
ARGUMENTS = ("denoiser", "canvas", "space", "seed", "valid", "cond")
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sample:
    """Finished canvases.

    `tokens` (B, L) int64; `calls` (B,) int64, the evaluations that each sample needed;
    `log_prob` (B,) nats, summed over the drawn tokens; `entropy` (B,), the mean nats of the
    draws, 0 where nothing was drawn.
    """

    tokens: Tensor
    calls: Tensor
    log_prob: Tensor
    entropy: Tensor


class Tally:
    """Adds up the states of a run; `sample()` is the result so far."""

    def __init__(self, canvas: Tensor) -> None:
        zeros = torch.zeros(canvas.shape[0], dtype=torch.float64, device=canvas.device)
        self.tokens, self.calls = canvas, zeros.long()
        self.log_prob, self.entropy, self.drawn = zeros, zeros, zeros.long()

    def add(self, state: State) -> None:
        """One more state."""
        self.tokens, self.calls = state.tokens, state.calls
        self.drawn = self.drawn + state.revealed.sum(1)
        self.log_prob = self.log_prob + state.log_prob.double().sum(1)
        self.entropy = self.entropy + state.entropy.double().sum(1)

    def sample(self) -> Sample:
        """The tokens and figures; MdiffError where a draw had no probabilities to draw from."""
        bad = self.log_prob.isnan().nonzero()[:, 0].tolist()
        if bad:
            raise MdiffError(
                f"the denoiser gave NaN or infinite logits for samples {bad}: the weights are "
                "damaged, or their type overflows (try dtype='float32')"
            )
        return Sample(
            self.tokens, self.calls, self.log_prob, self.entropy / self.drawn.clamp(min=1)
        )


def sample(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    sampler: str | Sampler = "first_hitting",
    seed: Seed = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    **options: Any,
) -> Sample:
    """The canvas (B, L) int64 filled in by a sampler, with its figures.

    Tokens other than the mask id are given and never changed; `valid` (B, L) bool is False
    at padding. `sampler` is a name from samplers/ or a function of their shape; `options`
    are that sampler's own, where a schedule or an inner sampler may be a name too; a
    `block_length` runs any sampler block by block, by `blocks`, as a block model's own does
    unasked. An int `seed` makes row b sample b of it, seeds (B,) int64 make each row sample 0
    of its own; a torch.Generator, or one a row, only yields seeds. Where nothing is hidden the
    row comes back unchanged with all figures 0.

    Raises ConfigError for an unknown sampler or option, DataError for a canvas that does not
    fit the space, MdiffError where the denoiser gives NaN.

    >>> from mdiff import from_logits, TokenSpace, sample
    >>> model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 3))
    >>> sample(model, torch.full((1, 4), 3), space=TokenSpace(3, mask_id=3)).calls.tolist()
    [4]
    """
    own = block_length_of(denoiser)
    function, settings = resolve(*in_blocks(sampler, options, own=own))
    tally = Tally(canvas)
    states = function(
        denoiser, canvas, space=space, seed=plain_seed(seed, len(canvas)), valid=valid,
        cond=cond, **settings,
    )  # fmt: skip
    with torch.no_grad():
        for state in states:
            tally.add(state)
    return tally.sample()


def plain_seed(seed: Seed, rows: int) -> int | Tensor:
    """An int or (rows,) int64 seeds; generators are asked for one number each."""
    if isinstance(seed, torch.Generator):
        return _yielded(seed)
    if isinstance(seed, list | tuple):
        if len(seed) != rows or not all(isinstance(one, torch.Generator) for one in seed):
            raise ConfigError(f"seed: expected {rows} torch.Generators, one a row, got {len(seed)}")
        return torch.tensor([_yielded(one) for one in seed], dtype=torch.int64, device="cpu")
    if isinstance(seed, bool) or not isinstance(seed, int | Tensor):
        raise ConfigError(f"seed={seed!r}: expected an int, (B,) int64 or torch.Generators")
    return seed


def _yielded(generator: torch.Generator) -> int:
    return int(torch.randint(MAX_SEED, (), generator=generator, device=generator.device))


def resolve(sampler: str | Sampler, options: Mapping[str, Any]) -> tuple[Sampler, dict[str, Any]]:
    """The sampler's function and its options as objects, checked against its signature.

    Raises ConfigError for an unknown sampler, an option that it does not take (naming the
    nearest that it does), or a value of the wrong kind.
    """
    sampler, options = in_blocks(sampler, options)
    function = find("samplers", sampler) if isinstance(sampler, str) else sampler
    if not callable(function) or "canvas" not in inspect.signature(function).parameters:
        raise ConfigError(
            f"{sampler!r} is not a sampler: expected (denoiser, canvas, *, space, ...)"
        )
    parameters = option_types(function)
    takes_more = parameters.pop("**", None) is not None
    settings = dict(options)
    if isinstance(settings.get("inner"), str) and "inner" in parameters:
        settings["inner"] = find("samplers", settings["inner"])
    if takes_more:
        inner = settings.get("inner") or inspect.signature(function).parameters["inner"].default
        if not callable(inner):
            raise ConfigError(f"inner={inner!r}: expected a sampler")
        parameters = {**option_types(inner), **parameters}
        parameters.pop("**", None)
    label = getattr(function, "__name__", str(function))
    for key in settings:
        if key not in parameters:
            raise ConfigError(f"{label} does not take {key!r}; {nearest(key, parameters)}")
        settings[key] = _as_object(key, settings[key], parameters[key], label)
    return function, settings


def in_blocks(
    sampler: str | Sampler, options: Mapping[str, Any], *, own: int | None = None
) -> tuple[str | Sampler, Mapping[str, Any]]:
    """The sampler with its options; with a block_length that is not its own, `blocks` over it.

    `own` is the block length of a block model: it is sampled block by block always, since a
    block's law is that of its place behind finished ones. Raises ConfigError for a length that
    does not divide it.

    >>> in_blocks("confidence", {"block_length": 4})
    ('blocks', {'block_length': 4, 'inner': 'confidence'})
    """
    asked = options.get("block_length", own)
    if asked is None:
        return sampler, options
    if own is not None and (type(asked) is not int or asked < 1 or own % asked):
        raise ConfigError(f"block_length={asked!r}: this model's blocks of {own} are whole ones")
    options = {**options, "block_length": asked}
    function = find("samplers", sampler) if isinstance(sampler, str) else sampler
    if not callable(function) or "block_length" in inspect.signature(function).parameters:
        return sampler, options
    return "blocks", {**options, "inner": sampler}


def option_types(function: Sampler) -> dict[str, Any]:
    """The options of a sampler and their types; "**" where it hands more to an inner one."""
    hints = typing.get_type_hints(function)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found["**"] = Any
        elif name not in ARGUMENTS:
            found[name] = hints.get(name, Any)
    return found


def _as_object(key: str, value: Any, hint: Any, label: str) -> Any:
    """The value as the option's type: names of schedules, lists as tensors or tuples."""
    if key == "schedule" and isinstance(value, str):
        return named_schedule(value)
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(value, list):
        if Tensor in kinds:
            try:
                value = torch.tensor(value)
            except (TypeError, ValueError):
                raise ConfigError(f"{label}: {key}={value!r}: expected whole numbers") from None
        elif any(typing.get_origin(kind) is tuple for kind in kinds):
            value = tuple(value)
    if not any(_fits(value, kind) for kind in kinds):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
        raise ConfigError(f"{label}: {key}={value!r}: expected {names}")
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (str, bool, Tensor, type(None)):
        return isinstance(value, kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple)
    # A schedule, a function or anything else that is not a plain value.
    return not isinstance(value, str | int | float | list | dict | None)
