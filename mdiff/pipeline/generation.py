"""A batch on its way: its states as they come, then its finished samples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mdiff.errors import ConfigError, nearest
from mdiff.modalities import EndsText, Modality
from mdiff.sampling import State, Tally
from mdiff.tokens import TokenSpace

POLICIES = ("cut", "keep", "suppress")


@dataclass(frozen=True)
class Generated:
    """One finished sample.

    `output` is what the modality makes of the tokens (a text is a str); `tokens` the ids;
    `calls` the evaluations it needed; `seconds` its share of the wall-clock of its batch;
    `log_prob` nats, summed over the drawn tokens; `entropy` the mean nats of the draws; the
    same options with `seed` and n=1 give this sample again.
    """

    output: Any
    tokens: list[int]
    calls: int
    seconds: float
    log_prob: float
    entropy: float
    seed: int

    def __str__(self) -> str:
        """The output as text."""
        return str(self.output)


@dataclass(frozen=True)
class Ending:
    """What is shown of a sample with an end drawn in it; `policy` is one of POLICIES.

    `cut` shows what comes before the first of the drawn `ids`, `keep` all. `suppress` never
    draws one. Without `echo` what is given in front is not shown.
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

    def shown(self, tokens: Sequence[int], hidden: Sequence[bool]) -> list[int]:
        """The tokens to show of a row; `hidden` says which of them were drawn."""
        first = 0 if self.echo or True not in hidden else list(hidden).index(True)
        stop = len(tokens)
        if self.policy == "cut":
            ends = (i for i, token in enumerate(tokens) if hidden[i] and token in self.ids)
            stop = next(ends, stop)
        return list(tokens[first:stop])


@dataclass
class Generation:
    """One batch being filled in: iterate over its states, then take `finished()`.

    `first` is the number of its first row among all rows asked for; `canvas` (B, L) int64,
    `valid` (B, L) bool or None and `seeds` (B,) int64 are what the sampler was given.
    """

    first: int
    canvas: Tensor
    valid: Tensor | None
    seeds: Tensor
    modality: Modality
    states: Iterator[State]
    mask_id: int
    ending: Ending = Ending()
    seconds: float = 0.0
    tally: Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = Tally(self.canvas)

    def __iter__(self) -> Iterator[State]:
        """The states; the clock runs only while the sampler does."""
        with torch.no_grad():
            while True:
                start = time.perf_counter()
                state = next(self.states, None)
                self.seconds += time.perf_counter() - start
                if state is None:
                    return
                self.tally.add(state)
                yield state

    def tokens(self, row: int) -> list[int]:
        """The tokens of a row as they stand, without padding."""
        ids = self.tally.tokens[row]
        found: list[int] = (ids if self.valid is None else ids[self.valid[row]]).tolist()
        return found

    def output(self, row: int) -> Any:
        """What the modality makes of a row as it stands."""
        ids = self.tokens(row)
        if not self.ending.ids and self.ending.echo:
            return self.modality.decode(ids)
        canvas = self.canvas[row] if self.valid is None else self.canvas[row][self.valid[row]]
        shown = self.ending.shown(ids, (canvas == self.mask_id).tolist())
        if isinstance(self.modality, EndsText):
            return self.modality.decode(shown, whole=True)
        return self.modality.decode(shown)

    def finished(self) -> list[Generated]:
        """Every sample of the batch, after running it to its end."""
        for _ in self:
            pass
        result = self.tally.sample()
        rows = len(self.canvas)
        return [
            Generated(
                output=self.output(row),
                tokens=self.tokens(row),
                calls=int(result.calls[row]),
                seconds=self.seconds / rows,
                log_prob=float(result.log_prob[row]),
                entropy=float(result.entropy[row]),
                seed=int(self.seeds[row]),
            )
            for row in range(rows)
        ]
