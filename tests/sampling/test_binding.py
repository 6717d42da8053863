"""A sampler is resolved and a canvas checked once a call, whichever way it comes in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from toys import HashDenoiser

import mdiff
from mdiff.errors import ConfigError, DataError
from mdiff.find import find, names
from mdiff.sampling import sample
from mdiff.sampling.binding import bind
from mdiff.schedule import Cosine
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(29, mask_id=29)


def canvas() -> torch.Tensor:
    tokens = torch.full((2, 8), SPACE.mask_id)
    tokens[0, :3] = 7
    return tokens


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a canvas was checked and a sampler looked for by its name."""
    counted = {"check": 0, "find": 0}

    def counting(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            counted[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(TokenSpace, "check", counting("check", TokenSpace.check))
    monkeypatch.setattr("mdiff.sampling.binding.find", counting("find", find))
    return counted


@pytest.mark.parametrize("name", names("samplers"))
def test_sample_checks_a_canvas_and_resolves_a_name_once(name: str, calls: dict[str, int]) -> None:
    sample(HashDenoiser(SPACE), canvas(), space=SPACE, sampler=name)
    assert calls == {"check": 1, "find": 1}


@pytest.mark.parametrize("name", names("samplers"))
def test_a_sampler_that_is_called_directly_checks_its_canvas_once(
    name: str, calls: dict[str, int]
) -> None:
    list(find("samplers", name)(HashDenoiser(SPACE), canvas(), space=SPACE))
    assert calls["check"] == 1
    with pytest.raises(DataError, match="token 40"):
        list(find("samplers", name)(HashDenoiser(SPACE), canvas() + 11, space=SPACE))


def test_a_pipeline_checks_each_batch_and_resolves_a_name_once(calls: dict[str, int]) -> None:
    pipeline = mdiff.load("builtin:shakespeare", device="cpu")
    calls.update(check=0, find=0)
    options = {"length": 8, "sampler": "confidence", "block_length": 4, "steps": 1}
    assert len(pipeline.generate(["To", "be", "or"], batch_size=2, **options)) == 3
    # The name, and that of `blocks`, which runs it.
    assert calls == {"check": 2, "find": 2}


def test_options_become_objects() -> None:
    bound = bind("confidence", {"schedule": "cosine", "noise": [2.0, 1.0], "steps": 2})
    assert bound.options["schedule"] == Cosine()
    assert bound.options["noise"].tolist() == [2.0, 1.0]
    assert (bound.takes("score"), bound.takes("grid"), bound.takes("canvas")) == (1, 0, 0)
    assert bound.with_default("steps", 7).options["steps"] == 2
    assert bound.with_default("score", "margin").options["score"] == "margin"
    assert bound.with_default("grid", (2, 2)) is bound


def test_a_block_length_puts_blocks_around_a_sampler_that_has_none() -> None:
    bound = bind("confidence", {"block_length": 4, "score": "margin"})
    assert bound.function is find("samplers", "blocks")
    assert bound.options["inner"] is find("samplers", "confidence")
    named = bind("blocks", {"inner": "confidence", "block_length": 4, "score": "margin"})
    assert named == bound


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("confidense", {}, "did you mean 'confidence'"),
        (len, {}, "is not a sampler"),
        ("confidence", {"step": 3}, "confidence does not take 'step'; did you mean 'steps'"),
        ("confidence", {"steps": 2.5}, "confidence: steps=2.5: expected int or NoneType"),
        ("confidence", {"noise": ["a"]}, "expected whole numbers"),
        ("blocks", {"inner": "confidence", "grid": (2, 2)}, "does not take 'grid'"),
        ("blocks", {"inner": 3}, "inner=3: expected a sampler"),
    ],
)
def test_what_cannot_be_bound_is_refused(
    sampler: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(sampler, options)
