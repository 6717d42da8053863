"""Self-test: samplers against a known distribution, and what float32 does to a reveal's rate."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser import FromLogits, from_logits
from mdiff.kernels import philox
from mdiff.sampling import sample
from mdiff.tokens import TokenSpace, hidden_canvas

VOCAB = 4
LENGTH = 4
SAMPLES = 20_000
# The axes other than each one.
OTHERS = [[i for i in range(LENGTH) if i != position] for position in range(LENGTH)]
# Family-wise, over the handful of checks below.
FALSE_ALARM = 1e-6

# Settings, and whether their law is the joint itself (one reveal a call, at a position that does
# not depend on the drawn token) or the product of the first call's marginals.
SETTINGS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("first_hitting", {}, True),
    ("any_order", {"order": "left_to_right"}, True),
    ("any_order", {"order": "random"}, True),
    ("confidence", {"score": "entropy"}, True),
    ("confidence", {"score": "margin"}, True),
    ("blocks", {"block_length": 2}, True),
    ("ancestral", {"steps": 1}, False),
)

# Of published code: the offset in its noise -log(u + offset) + offset, and the bits of a float32
# uniform.
OFFSET = 1e-10
FLOAT32_BITS = 24


@dataclass(frozen=True)
class Check:
    """One comparison: the setting, its chi-square's p-value, and whether it passed."""

    name: str
    p_value: float
    passed: bool


def toy() -> tuple[Tensor, Tensor, FromLogits]:
    """A joint distribution of LENGTH dependent tokens, the product of its marginals, its denoiser.

    The denoiser is the ideal one, by a table of all canvases.
    """
    generator = torch.Generator().manual_seed(0)
    joint = torch.randn((VOCAB,) * LENGTH, generator=generator, dtype=torch.float64).mul(2).exp()
    joint /= joint.sum()
    canvases = product(range(VOCAB + 1), repeat=LENGTH)
    table = torch.stack([_conditionals(joint, canvas) for canvas in canvases])
    base = (VOCAB + 1) ** torch.arange(LENGTH - 1, -1, -1)
    independent = torch.ones((), dtype=torch.float64)
    for others in OTHERS:
        independent = independent[..., None] * joint.sum(others)
    return joint, independent, from_logits(lambda tokens: table[(tokens * base).sum(1)])


def _conditionals(joint: Tensor, canvas: Sequence[int]) -> Tensor:
    """Log-probabilities (LENGTH, VOCAB) of the tokens at each position of a canvas."""
    given = joint
    for position, token in enumerate(canvas):
        if token != VOCAB:
            one = torch.nn.functional.one_hot(torch.tensor(token), VOCAB).double()
            given = given * one.view([-1 if i == position else 1 for i in range(LENGTH)])
    rows = torch.stack([given.sum(others) for others in OTHERS])
    return (rows / rows.sum(1, keepdim=True)).log()


def check_samplers() -> Iterator[Check]:
    """Each sampler's chi-square against its exact law, `SAMPLES` samples each."""
    joint, independent, denoiser = toy()
    limit, space = FALSE_ALARM / len(SETTINGS), TokenSpace(VOCAB, mask_id=VOCAB)
    canvas = hidden_canvas(SAMPLES, LENGTH, space=space)
    for sampler, options, is_joint in SETTINGS:
        drawn = sample(denoiser, canvas, space=space, sampler=sampler, seed=1, **options)
        number = (drawn.tokens * VOCAB ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
        observed = torch.bincount(number, minlength=VOCAB**LENGTH).double()
        law = joint if is_joint else independent
        p_value = chi_square_p(observed, law.flatten() * SAMPLES)
        shown = ", ".join(f"{key}={value}" for key, value in options.items())
        yield Check(f"{sampler}({shown})", p_value, p_value > limit)


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """The p-value of Pearson's statistic; classes with an expected count below 5 are pooled."""
    rare = expected < 5
    if bool(rare.any()):
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def reveal_rates(
    vocab: int = 50_257, steps: int = 1024, *, bits: int = FLOAT32_BITS
) -> dict[str, float | int]:
    """How often the middle of `steps` ancestral steps reveals a position, of how often it should.

    `joint_categorical` is one draw over a uniform row of `vocab` ids and the mask, the largest
    p / (1e-10 - log(u + 1e-10)) as published for masked diffusion, u uniform on multiples of
    2^-bits as in float32: an id needs noise of the least few values there are, and most have
    none so small (Zheng et al. 2024, arXiv 2409.02908: truncated Gumbel noise, which acts as a
    lower temperature). `ours` is one uniform (x + 0.5) 2^-32 beside the masking schedule, the ids
    drawn apart. Both are sums over the values of the uniforms, nothing is sampled.
    """
    # A position hidden at time 1/2 is revealed with this probability by the linear schedule.
    chance = 2 / steps
    ratio = chance / (1 - chance) / vocab
    grid: int = 2**bits

    def larger(noise: float) -> int:
        """How many values of u give a larger noise."""
        return min(grid, max(0, math.ceil(grid * (math.exp(OFFSET - noise) - OFFSET))))

    revealed, fewer, less = 0.0, larger(0.0), 0
    while fewer:
        # The mask's noise lets an id of the `less` least noises win, and none of a larger one.
        less += 1
        least = OFFSET - math.log(1 - less / grid + OFFSET) if less < grid else math.inf
        before, fewer = fewer, larger(least / ratio)
        revealed += (before - fewer) / grid * -math.expm1(vocab * math.log1p(-(less - 1) / grid))
    words = philox.WORD + 1
    hidden, after = (math.ceil(words * m - 0.5) for m in (0.5, 0.5 - 1 / steps))
    return {
        "vocab": vocab, "steps": steps, "joint_categorical": revealed / chance,
        "ours": (hidden - after) / hidden / chance,
    }  # fmt: skip
