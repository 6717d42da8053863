"""Evaluation metrics: the bound in bits by each unit, and figures of samples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mdiff.errors import ConfigError, DataError
from mdiff.objective import Bound
from mdiff.pipeline import Generated, Pipeline, Progress, bound_of_rows, windows

NATS_PER_BIT = math.log(2)
LONGEST_NGRAM = 3


@dataclass(frozen=True)
class Evaluation:
    """The bound on -log p of the data.

    `nats` in total, with `stderr` over the draws; `units` counts the data by each unit, tokens
    included; `windows` is the number of rows, `draws` the number of maskings of each.
    """

    nats: float
    stderr: float
    units: dict[str, int]
    estimator: str
    draws: int
    windows: int

    @classmethod
    def of(
        cls, pipeline: Pipeline, bound: Bound, units: dict[str, int], *, estimator: str | None,
        draws: int,
    ) -> Evaluation:  # fmt: skip
        """The sum over the rows of a bound; their errors are independent."""
        return cls(
            nats=float(bound.nats.sum()),
            stderr=float(bound.stderr.square().sum().sqrt()),
            units=units,
            estimator=estimator or ("time" if pipeline.denoiser.uses_time else "any_order"),
            draws=draws,
            windows=len(bound.nats),
        )

    def bits_per(self, unit: str) -> tuple[float, float]:
        """Bits a unit ("token", "char", "byte", ...) and its standard error."""
        scale = self.units[unit] * NATS_PER_BIT
        return self.nats / scale, self.stderr / scale

    def as_dict(self) -> dict[str, object]:
        """Everything, with bits_per_UNIT and bits_per_UNIT_stderr for each unit."""
        found: dict[str, object] = {}
        for unit in self.units:
            found[f"bits_per_{unit}"], found[f"bits_per_{unit}_stderr"] = self.bits_per(unit)
        counts = {f"{unit}s": count for unit, count in self.units.items()}
        how = {"estimator": self.estimator, "draws": self.draws, "windows": self.windows}
        return found | how | counts


def evaluate(
    pipeline: Pipeline, documents: Sequence[str], *, estimator: str | None = None,
    draws: int = 64, seed: int = 0, batch_size: int = 32, window: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """The bound of the documents, each cut into adjacent windows that are scored independently.

    `window` is the model's own by default. The end of a document is scored where the modality
    has a token for it. The standard error is that of the estimate for these very documents, over
    the draws, not over other documents. Neither depends on `batch_size`.

    Raises DataError where there is no token to score, ConfigError for a window below 1.
    """
    width = window or pipeline.window or 0
    if width < 1:
        raise ConfigError(f"window={width}: need at least 1, and this model does not name its own")
    cut = windows(pipeline, documents, window=width, end=True)
    if not cut.rows:
        raise DataError("there is nothing to score: the data holds no token")
    bound = bound_of_rows(
        pipeline, cut, estimator=estimator, draws=draws, seed=seed, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    units = {"token": sum(map(len, cut.rows)), **pipeline.modality.sizes(documents)}
    return Evaluation.of(pipeline, bound, units, estimator=estimator, draws=draws)


def sample_figures(samples: Sequence[Generated]) -> dict[str, object]:
    """Mean calls, mean nats of the draws, and the variety of the samples' tokens.

    `unigram_entropy_bits` is the mean over samples of the entropy of a sample's own tokens;
    `distinct_n` the share of different n-grams among those of all samples, None without any.
    """
    count = len(samples)
    found: dict[str, object] = {
        "samples": count,
        "calls": sum(sample.calls for sample in samples) / count,
        "seconds": sum(sample.seconds for sample in samples),
        "draw_entropy_nats": sum(sample.entropy for sample in samples) / count,
        "unigram_entropy_bits": sum(_entropy_bits(sample.tokens) for sample in samples) / count,
    }
    for size in range(1, LONGEST_NGRAM + 1):
        grams = [
            tuple(sample.tokens[i : i + size])
            for sample in samples
            for i in range(len(sample.tokens) - size + 1)
        ]
        found[f"distinct_{size}"] = len(set(grams)) / len(grams) if grams else None
    return found


def _entropy_bits(tokens: Sequence[int]) -> float:
    total = len(tokens)
    return -sum(n / total * math.log2(n / total) for n in Counter(tokens).values())
