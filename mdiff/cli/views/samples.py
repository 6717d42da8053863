"""Finished samples: one line of figures, or the entries of a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mdiff.pipeline import Generated

# Of the nats of a token.
DECIMALS = 6


def figures(sample: Generated) -> str:
    """One line on a sample: tokens, calls, seconds, and labelled nats."""
    # Of a sampler that writes a token twice, or chooses by what it drew, the sum is no likelihood.
    of = "" if sample.log_prob_is_exact else " of all draws"
    return (
        f"{len(sample.tokens)} tokens, {sample.calls} calls, {sample.seconds:.2f} s, "
        f"entropy {sample.entropy:.3f} nats a draw, "
        f"log-probability{of} {sample.log_prob:.2f} nats, seed {sample.seed}"
        + (f", length by {sample.grow}" if sample.grow else "")
    )


def entries(sample: Generated) -> dict[str, object]:
    """The figures of a sample as entries of a JSON object; "writing" has one number a token."""
    writing = sample.writing._asdict()
    return {
        "tokens": sample.tokens,
        "calls": sample.calls,
        "seconds": round(sample.seconds, 6),
        "log_prob": sample.log_prob,
        "log_prob_is_exact": sample.log_prob_is_exact,
        "entropy": sample.entropy,
        "seed": sample.seed,
        "writing": {name: [round(x, DECIMALS) for x in values] for name, values in writing.items()},
        **({"grow": sample.grow} if sample.grow else {}),
    }


def summary(samples: Sequence[Generated]) -> str:
    """One line on all samples: how many, the calls of each, and seconds."""
    calls = sorted({sample.calls for sample in samples})
    each = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    seconds = sum(sample.seconds for sample in samples)
    return f"{len(samples)} samples, {each} calls each, {seconds:.2f} s"
