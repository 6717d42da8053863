"""Where a sample ends: ids that end one, and canvases that grow until one is drawn."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps

import torch
from torch import Tensor

from mdiff.denoiser import Denoiser, block_length_of
from mdiff.errors import ConfigError, nearest
from mdiff.sampling.binding import BoundSampler
from mdiff.sampling.state import State
from mdiff.tokens import TokenSpace

POLICIES = ("cut", "keep", "suppress")
# How the length of a sample may be found.
GROWTHS = ("blocks", "daedal")
# Of DAEDAL: the hidden positions at first, how many are added at once, how many of the last ones
# are looked at, and how sure of an end they are to be in the mean.
FIRST, ADDED, LOOKED_AT, SURE = 64, 8, 32, 0.5


@dataclass(frozen=True)
class Ending:
    """How the ids that end a sample are treated; `policy` is one of POLICIES.

    "cut" shows what comes before the first of `ids` that is drawn, "keep" shows all, "suppress"
    never draws one. Without `echo` the tokens given in front are not shown.
    """

    ids: tuple[int, ...] = ()
    policy: str = "cut"
    echo: bool = True

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"unknown end {self.policy!r}; {nearest(self.policy, POLICIES)}")
        if self.policy != "cut" and not self.ids:
            raise ConfigError(f"end={self.policy!r}: this model has no id that ends a sample")

    def space(self, space: TokenSpace) -> TokenSpace:
        """The space to sample from."""
        if self.policy != "suppress":
            return space
        return replace(space, never=(*space.never, *self.ids))

    def stop(self, tokens: Sequence[int], hidden: Sequence[bool]) -> int:
        """How many tokens come before the first drawn end that cuts; `hidden` is true of drawn."""
        if self.policy != "cut":
            return len(tokens)
        ends = (i for i, token in enumerate(tokens) if hidden[i] and token in self.ids)
        return next(ends, len(tokens))

    def shown(self, tokens: Sequence[int], hidden: Sequence[bool]) -> list[int]:
        """The tokens to show of a row; `hidden` is true where one was drawn."""
        first = 0 if self.echo or True not in hidden else list(hidden).index(True)
        return list(tokens[first : self.stop(tokens, hidden)])


def grown_canvases(
    grow: str, canvases: Sequence[Sequence[int]], denoiser: Denoiser, *, space: TokenSpace,
    ending: Ending, device: torch.device, revised: bool = False,
) -> tuple[list[list[int]], list[int]]:  # fmt: skip
    """The canvases to fill in where `grow` says how their lengths are found, and each one's calls.

    Those of "daedal" have as many of the masks at their ends as it finds; "" leaves all as they
    are. Raises ConfigError where no sample of this model can grow so, or none can end.
    """
    unchanged = [list(canvas) for canvas in canvases], [0] * len(canvases)
    if not grow:
        return unchanged
    if grow not in GROWTHS:
        raise ConfigError(f"unknown grow {grow!r}; {nearest(grow, GROWTHS)}")
    if not ending.ids or ending.policy != "cut" or revised:
        raise ConfigError(
            f"grow={grow!r}: needs a model with an id that ends a sample, end='cut', no given="
        )
    right = "daedal" if block_length_of(denoiser) is None else "blocks"
    if grow != right:
        kind = "attends to every block" if right == "daedal" else "is one of blocks"
        raise ConfigError(f"grow={grow!r}: this model {kind}, use grow={right!r}")
    if grow == "blocks":
        return unchanged
    found = []
    for canvas in canvases:
        given = list(canvas)
        while given and given[-1] == space.mask_id:
            given.pop()
        most = len(canvas) - len(given)
        found.append(daedal(denoiser, given, most, space=space, ends=ending.ids, device=device))
    return [canvas for canvas, _ in found], [calls for _, calls in found]


def growing(bound: BoundSampler, ends: Sequence[int]) -> BoundSampler:
    """`blocks` for one row which, behind a block in which one of `ends` is drawn, draws nothing.

    So a canvas whose later blocks no position attends to grows, block by block, until it ends.
    Raises ConfigError for a sampler without an inner one.
    """
    if not bound.takes("inner"):
        raise ConfigError(f"grow='blocks': {bound.function.__name__} is no sampler of blocks")
    inner, ended = bound.inner, False

    @wraps(inner)
    def grown(
        denoiser: Denoiser, canvas: Tensor, *, space: TokenSpace, **options: object
    ) -> Iterator[State]:
        nonlocal ended
        if ended:
            raise _EndedError
        tokens, hidden = canvas, canvas == space.mask_id
        for state in inner(denoiser, canvas, space=space, **options):
            tokens = state.tokens
            yield state
        ended = bool((hidden & torch.isin(tokens, tokens.new_tensor(ends))).any())

    @wraps(bound.function)
    def run(*arguments: object, **options: object) -> Iterator[State]:
        with suppress(_EndedError):
            yield from bound.function(*arguments, **options)

    return BoundSampler(run, {**bound.options, "inner": grown})


class _EndedError(Exception):
    """The row has ended: what stands behind is not filled in."""


def daedal(
    denoiser: Denoiser, given: Sequence[int], most: int, *, space: TokenSpace,
    ends: Sequence[int], device: torch.device,
) -> tuple[list[int], int]:  # fmt: skip
    """The ids `given` with as many masks behind them as DAEDAL finds, and its calls.

    Its first stage (Li et al. 2025): FIRST masks, of which ADDED more are put behind, one call
    each, until the mean over the last LOOKED_AT of the probability of `ends` is above SURE, or
    there are `most`. The insertion of masks while decoding, its second stage, is not done.
    """
    if most < 1:
        return list(given), 0
    length, calls = min(FIRST, most), 0
    columns = torch.tensor(sorted(ends), device=device)
    while True:
        canvas = torch.tensor([[*given, *[space.mask_id] * length]], device=device)
        at = torch.zeros_like(canvas, dtype=torch.bool)
        at[:, -min(LOOKED_AT, length) :] = True
        t = torch.ones(1, device=device) if denoiser.uses_time else None
        with torch.no_grad():
            logits = denoiser(canvas, at=at, t=t).float()
        calls += 1
        logits[:, list(space.forbidden)] = -torch.inf
        sure = logits.softmax(-1)[:, columns].sum(-1).mean()
        if length == most or float(sure) > SURE:
            return canvas[0].tolist(), calls
        length = min(length + ADDED, most)
