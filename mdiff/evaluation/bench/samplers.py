"""Every sampler's quality against its calls: on an exactly known joint, and on shipped models."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from statistics import mean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from mdiff.errors import BackendError, ConfigError
from mdiff.evaluation.image_metrics import frechet, pixel_features
from mdiff.evaluation.selftest import FALSE_ALARM, chi_square_p, toy
from mdiff.find import names
from mdiff.modalities.image import image_modality
from mdiff.objective import nll_bound
from mdiff.pipeline import CallOptions, Pipeline, load
from mdiff.sampling import Sample, bind, sample
from mdiff.tokens import TokenSpace, hidden_canvas

TOY, TEXT, PICTURES = "toy", "builtin:shakespeare", "builtin:emoji"
# A sampler is measured with its defaults and with the values of the first of these options that
# it takes; on a model with the value behind them alone, for about 16 calls a sample.
OPTIONS: Mapping[str, tuple[tuple[object, ...], Callable[[int], object]]] = {
    "block_length": ((2,), lambda hidden: 16),
    "per_call": ((2, 4), lambda hidden: -(-hidden // 16)),
    "nats_per_call": ((0.5, 1.5), lambda hidden: 20.0),
    "drafts": ((2, 4), lambda hidden: 8),
    "sweeps": ((4.0,), lambda hidden: 0.125),
    "steps": ((2, 16), lambda hidden: 16),
}
# Further settings that change what a sampler is good for.
MORE: Mapping[str, dict[str, object]] = {
    "confidence": {"noise": 4.5}, "path_planning": {"score": "drawn"}
}  # fmt: skip
# Features of pictures: side of the averaged grid. Draws of the bound.
SIDE, DRAWS = 4, 2

Figures = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Amount:
    """Samples of the toy; samples of each model, and the tokens of a text (0: no model)."""

    toy: int = 20_000
    text: int = 8
    length: int = 64
    pictures: int = 8

    @classmethod
    def quick(cls) -> "Amount":
        """Under 20 s; without pictures."""
        return cls(toy=2_000, text=2, length=16, pictures=0)


@dataclass(frozen=True)
class SamplerRow:
    """A sampler with its options on a toy or a model.

    `calls`, `rounds` and `taken_back`, the tokens that were written again, are means a sample.
    `law` is "joint" where the samples of the toy agree with it, else "own". `figures` are (value,
    standard error) by name; `note` says why nothing was measured.
    """

    sampler: str
    options: Mapping[str, object]
    where: str
    samples: int = 0
    calls: float | None = None
    rounds: float | None = None
    taken_back: float | None = None
    law: str = ""
    figures: Figures = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, object]:
        """All fields."""
        return asdict(self)


def settings_of(name: str, hidden: int | None = None) -> list[dict[str, Any]]:
    """The options to measure a sampler with: on the toy, or on `hidden` positions of a model."""
    bound = bind(name, {})
    taken = next((option for option in OPTIONS if bound.takes(option)), None)
    found: list[dict[str, Any]] = [{}]
    if taken is not None:
        values, of_hidden = OPTIONS[taken]
        if hidden is not None:
            found = [{taken: of_hidden(hidden)}]
        else:
            found += [{taken: value} for value in values]
    return found + ([{**found[-1], **MORE[name]}] if name in MORE else [])


def sampler_rows(amount: Amount, say: Callable[[str], None]) -> Iterator[SamplerRow]:
    """A row for each setting of each sampler: on the toy, then on the models."""
    yield from toy_rows(amount.toy, say)
    if amount.text:
        pipeline = load(TEXT, device="cpu")
        canvases = pipeline.canvases(num_samples=amount.text, length=amount.length)
        yield from model_rows(pipeline, TEXT, canvases, say)
    if amount.pictures:
        pipeline = load(PICTURES, device="cpu")
        prompt = {"caption": "grinning face"}
        canvases = pipeline.canvases(prompt, num_samples=amount.pictures)
        yield from model_rows(pipeline, PICTURES, canvases, say)


def toy_floor(samples: int) -> float:
    """The total variation from the joint that so many samples of itself have in the mean."""
    p = toy()[0].flatten()
    return float((2 * p * (1 - p) / (math.pi * samples)).sqrt().sum() / 2)


def toy_rows(samples: int, say: Callable[[str], None]) -> Iterator[SamplerRow]:
    """The total variation of each sampler's samples from the joint of the self-test's toy."""
    joint, _, denoiser = toy()
    vocab, length, p = joint.shape[0], joint.dim(), joint.flatten()
    space = TokenSpace(vocab, mask_id=vocab)
    canvas = hidden_canvas(samples, length, space=space)
    base = vocab ** torch.arange(length - 1, -1, -1)
    asked = [(name, options) for name in names("samplers") for options in settings_of(name)]
    for name, options in asked:
        say(f"{name} on a toy")
        row = SamplerRow(name, options, TOY, samples)
        try:
            made = sample(denoiser, canvas, space=space, sampler=name, seed=1, **options)
        except ConfigError as error:
            yield replace(row, note=str(error))
            continue
        found = torch.bincount((made.tokens * base).sum(1), minlength=len(p)).double()
        apart = found / samples - p
        # The influence of a sample on the sum of absolute differences is the sign of its class.
        sign = apart.sign()
        variance = (p * sign.square()).sum() - (p * sign).sum() ** 2
        figures = {"tv": (float(apart.abs().sum() / 2), float((variance / samples).sqrt()) / 2)}
        agrees = chi_square_p(found, p * samples) > FALSE_ALARM / len(asked)
        law = "joint" if agrees else "own"
        yield _with_cost(replace(row, law=law, figures=figures), made)


def model_rows(
    pipeline: Pipeline, where: str, canvases: list[list[int]], say: Callable[[str], None]
) -> Iterator[SamplerRow]:
    """The cost of each sampler on a model, and figures of what it makes.

    "bound" is the model's own in bits a token, which likes texts without surprises; so beside it
    "distinct", the share of a sample's neighbouring tokens that are no repetition of other ones.
    Of pictures "frechet" too, in pixels averaged to 4 x 4, from those of the exact sampler.
    """
    hidden = canvases[0].count(pipeline.space.mask_id)
    exact = None
    if where == PICTURES:
        say(f"first_hitting on {where}, for comparison")
        exact = _made(pipeline, canvases, "first_hitting", {}, seed=2).tokens
    for name in names("samplers"):
        for options in settings_of(name, hidden):
            say(f"{name} on {where}")
            row = SamplerRow(name, options, where, len(canvases))
            try:
                made = _made(pipeline, canvases, name, options, seed=1)
            except ConfigError as error:
                yield replace(row, note=str(error))
                continue
            figures = _figures(pipeline, made.tokens, exact)
            yield _with_cost(replace(row, figures=figures), made)


def _made(
    pipeline: Pipeline, canvases: list[list[int]], name: str, options: Mapping[str, object], *,
    seed: int,
) -> Sample:  # fmt: skip
    more = {"sampler": name, "seed": seed, "batch_size": len(canvases)}
    (run,) = pipeline.runs(canvases, **cast(CallOptions, {**options, **more}))
    for _ in run:
        pass
    return run.tally.sample()


def _with_cost(row: SamplerRow, made: Sample) -> SamplerRow:
    again = (made.writing.times - 1).clamp(min=0).sum(1)
    calls, rounds, taken_back = (
        float(each.double().mean()) for each in (made.calls, made.rounds, again)
    )
    return replace(row, calls=calls, rounds=rounds, taken_back=taken_back)


def _figures(pipeline: Pipeline, tokens: Tensor, exact: Tensor | None) -> Figures:
    with torch.no_grad():
        bound = nll_bound(
            pipeline.denoiser, tokens, space=pipeline.space, schedule=pipeline.schedule,
            draws=DRAWS, seed=0,
        ).nats / (tokens.shape[1] * math.log(2))  # fmt: skip
    pairs = [len(set(pairwise(row))) / (len(row) - 1) for row in tokens.tolist()]
    found = {"bound": _mean(bound.tolist()), "distinct": _mean(pairs)}
    if exact is not None:
        shown = image_modality(pipeline.modality).shown
        real, fake = (pixel_features(shown(rows), side=SIDE) for rows in (exact, tokens))
        # Without torchmetrics there is none.
        with suppress(BackendError):
            found["frechet"] = jackknife(lambda some: frechet(real, some), fake)
    return found


def _mean(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) / math.sqrt(len(values))


def jackknife(figure: Callable[[Tensor], float], features: Tensor) -> tuple[float, float]:
    """A figure of features (N, D) and its standard error, by leaving out one row at a time."""
    count = len(features)
    rows = torch.arange(count)
    without = [figure(features[rows != left_out]) for left_out in range(count)]
    return figure(features), stdev(without) * (count - 1) / math.sqrt(count)
