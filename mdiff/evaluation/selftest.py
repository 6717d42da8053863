"""Self-test: the samplers against an exactly known distribution of 256 states."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser import FromLogits, from_logits
from mdiff.sampling import sample
from mdiff.tokens import TokenSpace, hidden_canvas

VOCAB = 4
LENGTH = 4
SAMPLES = 20_000
# The axes other than each one.
OTHERS = [[i for i in range(LENGTH) if i != position] for position in range(LENGTH)]
# Family-wise, over the handful of checks below.
FALSE_ALARM = 1e-6

# Settings whose law is the joint itself (one reveal a call, at a position that does not depend on
# the drawn token), and the one whose law is the product of the first call's marginals.
Setting = tuple[str, dict[str, Any]]
EXACT: tuple[Setting, ...] = (
    ("first_hitting", {}),
    ("any_order", {"order": "left_to_right"}),
    ("any_order", {"order": "random"}),
    ("confidence", {"score": "entropy"}),
    ("confidence", {"score": "margin"}),
    ("blocks", {"block_length": 2}),
)
INDEPENDENT: tuple[Setting, ...] = (("ancestral", {"steps": 1}),)


@dataclass(frozen=True)
class Check:
    """One comparison: the setting, its chi-square's p-value, and whether it passed."""

    name: str
    p_value: float
    passed: bool


class Toy:
    """A joint distribution of LENGTH dependent tokens, and its ideal denoiser."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (VOCAB,) * LENGTH
        self.joint = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).exp()
        self.joint /= self.joint.sum()
        self.space = TokenSpace(VOCAB, mask_id=VOCAB)
        base = VOCAB + 1
        self.base = base ** torch.arange(LENGTH - 1, -1, -1)
        canvases = torch.arange(base**LENGTH)[:, None] // self.base % base
        self.table = torch.stack([self._conditionals(canvas.tolist()) for canvas in canvases])

    def _conditionals(self, canvas: list[int]) -> Tensor:
        """Log-probabilities (LENGTH, VOCAB) of the tokens at each position of a canvas."""
        given = self.joint
        for position, token in enumerate(canvas):
            if token != VOCAB:
                one = torch.nn.functional.one_hot(torch.tensor(token), VOCAB).double()
                given = given * one.view([-1 if i == position else 1 for i in range(LENGTH)])
        rows = torch.stack([given.sum(others) for others in OTHERS])
        return (rows / rows.sum(1, keepdim=True)).log()

    def denoiser(self) -> FromLogits:
        """The ideal denoiser, by its table."""
        return from_logits(lambda tokens: self.table[(tokens * self.base).sum(1)])

    def marginal_product(self) -> Tensor:
        """The law of all positions drawn independently, from one call."""
        law = torch.ones((), dtype=torch.float64)
        for others in OTHERS:
            law = law[..., None] * self.joint.sum(others)
        return law


def check_samplers() -> Iterator[Check]:
    """Each sampler's chi-square against its exact law, `SAMPLES` samples each."""
    toy = Toy()
    limit = FALSE_ALARM / (len(EXACT) + len(INDEPENDENT))
    laws = [(EXACT, toy.joint), (INDEPENDENT, toy.marginal_product())]
    for settings, law in laws:
        for sampler, options in settings:
            drawn = sample(
                toy.denoiser(), hidden_canvas(SAMPLES, LENGTH, space=toy.space),
                space=toy.space, sampler=sampler, seed=1, **options,
            )  # fmt: skip
            number = (drawn.tokens * VOCAB ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
            observed = torch.bincount(number, minlength=VOCAB**LENGTH).double()
            p_value = chi_square_p(observed, law.flatten() * SAMPLES)
            shown = ", ".join(f"{key}={value}" for key, value in options.items())
            label = f"{sampler}({shown})"
            yield Check(label, p_value, p_value > limit)


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """The p-value of Pearson's statistic; classes with an expected count below 5 are pooled."""
    rare = expected < 5
    if bool(rare.any()):
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
