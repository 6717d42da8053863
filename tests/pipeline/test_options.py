"""The arguments of generate: names old and new, counts of tokens, seeds, and typed options."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any

import pytest
import torch

from mdiff.backbones.transformer import transformer
from mdiff.denoiser import from_logits
from mdiff.errors import ConfigError
from mdiff.find import find, names
from mdiff.modalities.text.modality import Text, text
from mdiff.pipeline.options import CallOptions, SamplingOptions, canvas_of
from mdiff.pipeline.pipeline import Pipeline

# What every sampler is handed, and the options that are not a sampler's.
ARGUMENTS = {"denoiser", "canvas", "space", "seed", "valid", "cond", "given"}
OF_A_CALL = {
    "batch_size", "guidance_scale", "guidance_schedule", "guidance_interval", "end", "echo", "n",
    "negative", "prompts", "grow",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    torch.manual_seed(0)
    model = transformer(vocab_size=256, width=16, depth=1, heads=2, max_length=32)
    return Pipeline(model.eval(), text().space, text(), window=32)


def windowed(window: int, modality: Text | None = None) -> Pipeline:
    """A model of text with a window of that length; its logits are all the same."""
    uniform = from_logits(lambda tokens: torch.zeros(*tokens.shape, 256))
    return Pipeline(uniform, text().space, modality or text(), window=window)


def members(hint: Any) -> set[Any]:
    """The types of a union, or the one type, without their own arguments."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {
        typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if is_union else (hint,))
    }


def test_the_typed_options_are_those_of_the_samplers() -> None:
    hints = typing.get_type_hints(SamplingOptions)
    known: set[str] = set()
    for name in names("samplers"):
        function = find("samplers", name)
        parameters = inspect.signature(function).parameters
        hinted = typing.get_type_hints(function)
        own = {
            key
            for key, parameter in parameters.items()
            if key not in ARGUMENTS and parameter.kind is not parameter.VAR_KEYWORD
        }
        known |= own
        for key in own & hints.keys():
            if key not in ("inner", "schedule"):
                assert members(hinted[key]) <= members(hints[key]), (name, key)
    assert hints.keys() - OF_A_CALL == known
    assert hints.keys() >= OF_A_CALL


def test_named_arguments_and_typed_options_do_not_overlap() -> None:
    for method in (Pipeline.generate, Pipeline.stream, Pipeline.infill, Pipeline.edit):
        parameters = inspect.signature(method).parameters
        options = SamplingOptions if method is Pipeline.generate else CallOptions
        assert not set(typing.get_type_hints(options)) & set(parameters)
        assert typing.get_type_hints(method)["options"] == typing.Unpack[options]


def test_old_names_give_the_samples_of_the_new_ones(tiny: Pipeline) -> None:
    options: dict[str, Any] = {"length": 12, "seed": 5, "guidance_scale": 2.0}
    new = tiny.generate(["ab", "c"], num_samples=2, negative_prompt="xy", **options)
    old = tiny.generate(prompts=["ab", "c"], n=2, negative="xy", **options)
    assert [sample.tokens for sample in old] == [sample.tokens for sample in new]
    gaps = {"seed": 5, "num_samples": 2}
    infilled = tiny.infill("a[MASK:4]", **gaps)
    assert infilled[1].tokens == tiny.infill("a[MASK:4]", seed=5, n=2)[1].tokens
    final = list(tiny.stream("ab", length=8, n=2, seed=4))[-1].tokens.tolist()
    assert final == list(tiny.stream("ab", length=8, num_samples=2, seed=4))[-1].tokens.tolist()


def test_prompts_may_come_from_an_iterator(tiny: Pipeline) -> None:
    lazy = tiny.generate(iter(["ab", "c"]), length=6, seed=1)  # type: ignore[arg-type]
    assert [sample.text for sample in lazy] == [
        sample.text for sample in tiny.generate(["ab", "c"], length=6, seed=1)
    ]


def test_new_tokens_are_counted_after_each_prompt(tiny: Pipeline) -> None:
    samples = tiny.generate(["ab", "cdefg", ""], max_new_tokens=4)
    assert [len(sample.tokens) for sample in samples] == [6, 9, 4]
    assert [sample.calls for sample in samples] == [4, 4, 4]
    assert samples[0].tokens == tiny.generate("ab", length=6)[0].tokens
    assert len(list(tiny.stream("abc", max_new_tokens=5))) == 5


@pytest.mark.parametrize(
    ("window", "size"), [(32, 32), (1024, 1024), (4096, 3 + 256), (1025, 3 + 256), (257, 257)]
)
def test_a_long_window_is_not_filled_unless_asked(window: int, size: int) -> None:
    canvas = canvas_of(windowed(window), "abc", length=None, max_new_tokens=None)
    assert len(canvas) == size


def test_a_prompt_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    modality = text()
    encode = modality.encode

    def watched(words: str) -> list[int]:
        encoded.append(words)
        return encode(words)

    monkeypatch.setattr(modality, "encode", watched)
    for window, options in ((32, {}), (4096, {}), (32, {"max_new_tokens": 3})):
        encoded.clear()
        model = windowed(window, modality)
        model.generate(["ab", "c"], num_samples=2, sampler="ancestral", steps=1, **options)
        assert encoded == ["ab", "c"]


def test_a_generator_yields_the_seed(tiny: Pipeline) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    (first,) = tiny.generate("ab", length=8, generator=generator())
    assert first.tokens == tiny.generate("ab", length=8, seed=generator())[0].tokens
    assert first.tokens == tiny.generate("ab", length=8, seed=first.seed)[0].tokens
    several = [generator(), torch.Generator().manual_seed(9)]
    pair = tiny.generate("ab", length=8, num_samples=2, generator=several)
    assert pair[0].seed == first.seed != pair[1].seed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 6, "max_new_tokens": 3}, "length and max_new_tokens: give one"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: need at least 1"),
        ({"max_new_tokens": 40}, "use sampler 'blocks'"),
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator: give one"),
        ({"num_samples": 2, "n": 3}, "num_samples and n"),
        ({"prompts": "cd"}, "prompt and prompts"),
        ({"num_samples": 0}, "num_samples=0: need at least 1"),
        ({"n": 0}, "num_samples=0: need at least 1"),
        ({"negative": "a", "negative_prompt": "b", "guidance_scale": 2.0}, "give one"),
        ({"num_sample": 2}, "does not take 'num_sample'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    tiny: Pipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.generate("ab", **options)


def test_a_sample_has_the_names_of_other_libraries(tiny: Pipeline) -> None:
    (sample,) = tiny.generate("ab", length=6)
    assert sample.text == sample.output == str(sample)
    assert sample.token_ids == sample.tokens
    assert sample.image is None
