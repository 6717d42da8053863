"""From a sampler's name and options to a call: both are resolved and checked here, once."""

from __future__ import annotations

import inspect
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser, block_length_of, corrects
from mdiff.errors import ConfigError, MdiffWarning, nearest
from mdiff.find import find, names
from mdiff.process import Process
from mdiff.sampling.state import State
from mdiff.schedule import named_schedule
from mdiff.tokens import TokenSpace

Sampler = Callable[..., Iterator[State]]

# What a call of a sampler gives it beside its options.
ARGUMENTS = ("denoiser", "canvas", "space", "seed", "valid", "cond", "given")


@dataclass(frozen=True)
class BoundSampler:
    """A sampler and its options, which were checked against its signature."""

    function: Sampler
    options: Mapping[str, object]

    def __call__(
        self,
        denoiser: Denoiser,
        canvas: Tensor,
        *,
        space: TokenSpace,
        seed: int | Tensor,
        valid: Tensor | None,
        cond: Condition | None,
        given: Tensor | None = None,
    ) -> Iterator[State]:
        """The states of the sampler on `canvas` (B, L) int64.

        Raises ConfigError where `given` (B, L) bool is given to a sampler that takes none.
        """
        more = dict(self.options)
        if given is not None:
            if "given" not in inspect.signature(self.function).parameters:
                raise ConfigError(f"{self.function.__name__} takes no given=: it never takes back")
            more["given"] = given
        return self.function(
            denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, **more
        )

    @property
    def inner(self) -> Sampler:
        """The sampler that fills each block; of a sampler without blocks, itself."""
        own = inspect.signature(self.function).parameters.get("inner")
        default = self.function if own is None else own.default
        return typing.cast(Sampler, self.options.get("inner", default))

    def takes(self, name: str) -> bool:
        """Whether the sampler itself has an option of that name."""
        return name not in ARGUMENTS and name in inspect.signature(self.function).parameters

    def with_default(self, name: str, value: object) -> BoundSampler:
        """The same with this option, where the sampler takes it and it was not given."""
        if name in self.options or not self.takes(name):
            return self
        return replace(self, options={**self.options, name: value})


def bind(
    sampler: str | Sampler, options: Mapping[str, object], denoiser: Denoiser | None = None
) -> BoundSampler:
    """The sampler of that name (or the function) with its options as objects.

    With a `block_length` that is not its own option, it is `blocks` with it as the inner sampler.
    A `denoiser` that is a block model is always sampled block by block, since its law is that of
    a block behind finished ones. A schedule or an inner sampler may be given by name.

    Raises ConfigError for an unknown sampler, an option that it does not take (with the nearest
    that it does), a value of the wrong kind, or a block_length that does not divide the model's.

    >>> bind("confidence", {"block_length": 4}).function.__name__
    'blocks'
    """
    function = _found(sampler)
    own = None if denoiser is None else block_length_of(denoiser)
    length = options.get("block_length", own)
    if length is not None:
        if own is not None and (type(length) is not int or length < 1 or own % length):
            raise ConfigError(f"block_length={length!r}: expected a divisor of this model's {own}")
        options = {**options, "block_length": length}
        if "block_length" not in inspect.signature(function).parameters:
            function, options = _found("blocks"), {**options, "inner": function}
    kinds = _option_types(function)
    settings = dict(options)
    if "inner" in kinds and isinstance(settings.get("inner"), str):
        settings["inner"] = find("samplers", str(settings["inner"]))
    if kinds.pop("**", None) is not None:
        inner = settings.get("inner") or inspect.signature(function).parameters["inner"].default
        if not callable(inner):
            raise ConfigError(f"inner={inner!r}: expected a sampler")
        kinds = {**_option_types(inner), **kinds}
        kinds.pop("**", None)
    label = function.__name__ if inspect.isroutine(function) else str(function)
    for key, value in settings.items():
        if key not in kinds:
            takers = [n for n in names("samplers") if key in _option_types(find("samplers", n))]
            verb = "does" if len(takers) == 1 else "do"
            hint = f"{', '.join(takers)} {verb}" if takers else nearest(key, kinds)
            what = ", the noise that the model was trained on" if key == "process" else ""
            raise ConfigError(f"{label} does not take {key!r}{what}; {hint}")
        settings[key] = _as_object(key, value, kinds[key], label)
    if "edit_threshold" in kinds and denoiser is not None and not corrects(denoiser):
        warnings.warn(
            "edit: this model was not trained to correct tokens that it is shown, and mostly "
            "copies them; remdm, psi and path_planning hide a token before they draw it again",
            MdiffWarning, stacklevel=2,
        )  # fmt: skip
    return BoundSampler(function, settings)


def _found(sampler: str | Sampler) -> Sampler:
    """The sampler's function; ConfigError for anything of another shape."""
    function: Sampler = find("samplers", sampler) if isinstance(sampler, str) else sampler
    if not callable(function) or "canvas" not in inspect.signature(function).parameters:
        raise ConfigError(
            f"{sampler!r} is not a sampler: expected (denoiser, canvas, *, space, ...)"
        )
    return function


def _option_types(function: Sampler) -> dict[str, object]:
    """The options of a sampler and their types; "**" where it hands more to an inner one."""
    hints = typing.get_type_hints(function)
    found: dict[str, object] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found["**"] = object
        elif name not in ARGUMENTS:
            found[name] = hints.get(name, object)
    return found


def _as_object(key: str, value: object, hint: object, label: str) -> object:
    """The value as the option's type: names of schedules, lists as tensors or tuples."""
    if key == "schedule" and isinstance(value, str):
        return named_schedule(value)
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    if isinstance(value, list):
        if Tensor in kinds:
            try:
                kind = torch.float32 if any(type(x) is float for x in value) else None
                value = torch.tensor(value, dtype=kind, device="cpu")
            except (TypeError, ValueError):
                raise ConfigError(f"{label}: {key}={value!r}: expected whole numbers") from None
        elif any(typing.get_origin(kind) is tuple for kind in kinds):
            value = tuple(value)
    if not any(_fits(value, kind) for kind in kinds):
        names = " or ".join(k.__name__ if isinstance(k, type) else str(k) for k in kinds)
        raise ConfigError(f"{label}: {key}={value!r}: expected {names}")
    return value


def _fits(value: object, kind: object) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(kind, type) and kind in (str, bool, Tensor, Process, type(None)):
        return isinstance(value, kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple)
    # A schedule, a function or anything else that is not a plain value.
    return not isinstance(value, str | int | float | list | dict | None)
