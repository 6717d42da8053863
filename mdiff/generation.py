"""A batch on its way: its states as they come, then its finished samples."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdiff.filling import State
from mdiff.sampling import Tally


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
    modality: Any
    states: Iterator[State]
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

    def finished(self) -> list[Generated]:
        """Every sample of the batch, after running it to its end."""
        for _ in self:
            pass
        result = self.tally.sample()
        rows = len(self.canvas)
        return [
            Generated(
                output=self.modality.decode(self.tokens(row)),
                tokens=self.tokens(row),
                calls=int(result.calls[row]),
                seconds=self.seconds / rows,
                log_prob=float(result.log_prob[row]),
                entropy=float(result.entropy[row]),
                seed=int(self.seeds[row]),
            )
            for row in range(rows)
        ]
