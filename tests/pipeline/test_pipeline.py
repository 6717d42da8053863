"""The pipeline on toys and on a tiny model made here: generation and scores."""

from __future__ import annotations

import math

import processes
import pytest
import torch
from folders import ROOT
from tiny_text import WINDOW, tiny
from toys import make_toy

import mdiff
from mdiff.errors import ConfigError
from mdiff.evaluation.evaluate import evaluate, sample_figures
from mdiff.modalities.text.modality import text
from mdiff.pipeline.pipeline import Pipeline
from mdiff.pipeline.scoring import bound_of_rows
from mdiff.tokens import Windows

TOY = make_toy()


def test_a_sample_can_be_had_again_alone_from_its_seed() -> None:
    pipeline = tiny()
    many = pipeline.generate(["a", "bcd"], n=3, seed=11, length=12, batch_size=4)
    assert [len(sample.tokens) for sample in many] == [12] * 6
    assert many[0].seed == 11
    for number, prompt in ((0, "a"), (2, "a"), (5, "bcd")):
        (alone,) = pipeline.generate(prompt, seed=many[number].seed, length=12)
        assert alone.tokens == many[number].tokens
        assert alone.log_prob == pytest.approx(many[number].log_prob, rel=1e-5)


def test_ragged_templates_are_filled_as_if_alone() -> None:
    pipeline = tiny()
    templates = ["a[MASK:3]b", "The [MASK:8] of [MASK:3] night"]
    together = pipeline.infill(templates, seed=2)
    assert [sample.calls for sample in together] == [3, 11]
    for template, sample in zip(templates, together, strict=True):
        (alone,) = pipeline.infill(template, seed=sample.seed)
        assert alone.tokens == sample.tokens
        canvas = pipeline.modality.template(template)
        given = [(a, b) for a, b in zip(canvas, sample.tokens, strict=True) if a != 256]
        assert all(a == b for a, b in given)


def test_a_stream_ends_where_generate_does() -> None:
    pipeline = tiny()
    states = list(pipeline.stream("ab", length=8, n=2, seed=4))
    assert len(states) == 6
    final = [sample.tokens for sample in pipeline.generate("ab", length=8, n=2, seed=4)]
    assert states[-1].tokens.tolist() == final


def test_a_text_longer_than_the_window_needs_blocks() -> None:
    pipeline = tiny()
    with pytest.raises(ConfigError, match="sampler 'blocks'"):
        pipeline.generate(length=3 * WINDOW)
    (sample,) = pipeline.generate(length=3 * WINDOW, sampler="blocks", block_length=8)
    assert len(sample.tokens) == sample.calls == 3 * WINDOW


def test_blocks_stop_at_the_end_of_text() -> None:
    pipeline = tiny(eos=True)
    bias = torch.zeros(257)
    bias[256] = 50.0
    certain = mdiff.from_logits(lambda tokens: bias.expand(*tokens.shape, 257))
    sure = Pipeline(certain, pipeline.space, pipeline.modality, window=WINDOW)
    (sample,) = sure.generate("ab", length=20, sampler="blocks", block_length=4)
    assert sample.calls == 4
    assert sample.output == "ab"


def test_guidance_masks_the_prompt_and_doubles_the_calls() -> None:
    pipeline = tiny()
    plain = pipeline.generate("abcdef", length=10, seed=1)[0]
    same = pipeline.generate("abcdef", length=10, seed=1, guidance_scale=1.0)[0]
    guided = pipeline.generate("abcdef", length=10, seed=1, guidance_scale=4.0)[0]
    assert same.tokens == plain.tokens
    assert (plain.calls, guided.calls) == (4, 8)


@pytest.mark.parametrize("options", [{"n": 0}, {"length": 0}, {"batch_size": 0}, {"length": -3}])
def test_numbers_below_one_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError, match="need at least 1"):
        tiny().generate("", **options)


def test_generating_text_imports_nothing_of_images_training_or_transformers() -> None:
    script = (
        "import sys, mdiff; mdiff.load('builtin:shakespeare', device='cpu').generate(length=2);"
        "print(*{'PIL', 'transformers', 'datasets', 'sklearn', 'pyarrow', 'accelerate',"
        " 'torch._dynamo', 'rich', 'typer'} & set(sys.modules))"
    )
    done = processes.python("-c", script, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def test_an_empty_list_of_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to generate"):
        tiny().generate([])


def test_the_score_of_a_uniform_model_is_the_log_of_its_ids() -> None:
    uniform = mdiff.from_logits(lambda tokens: torch.zeros(*tokens.shape, 256))
    pipeline = Pipeline(uniform, text().space, text(), window=8)
    texts = ["hello", "x" * 30, ""]
    bound = pipeline.score(texts, draws=4)
    expected = [len(written) * math.log(256) for written in texts]
    assert bound.nats.tolist() == pytest.approx(expected)
    found = evaluate(pipeline, ["héllo", "x" * 30], draws=2)
    assert found.windows == 1 + 4
    assert found.bits_per("byte")[0] == pytest.approx(8)
    assert found.bits_per("char")[0] == pytest.approx(8 * 36 / 35)
    keys = {"bits_per_token", "bits_per_char_stderr", "estimator", "draws", "windows", "bytes"}
    assert keys <= set(found.as_dict())


def test_the_score_is_the_exact_bound_on_a_toy() -> None:
    pipeline = Pipeline(TOY.denoiser(), TOY.space, None)
    tokens = [[0, 1, 2, 3], [3, 3, 0, 1]]
    rows = Windows(tokens, [0, 1], TOY.space)
    exact = bound_of_rows(pipeline, rows, estimator="exact")
    rough = bound_of_rows(pipeline, rows, draws=300)
    assert torch.allclose(exact.nats, -TOY.joint[tuple(torch.tensor(tokens).T)].log())
    # Six standard errors: one false alarm in 5e8.
    assert bool(((rough.nats - exact.nats).abs() < 6 * rough.stderr).all())


@pytest.mark.parametrize("estimator", ["any_order", "time"])
def test_neither_the_batch_nor_the_rows_beside_it_changes_a_bound(estimator: str) -> None:
    pipeline = tiny()
    texts = ["abcdefgh" * 5, "hello", "the quick brown fox"]
    options = {"estimator": estimator, "draws": 3, "seed": 5}
    whole, one = (pipeline.score(texts, batch_size=size, **options) for size in (32, 1))
    assert torch.allclose(whole.nats, one.nats, rtol=1e-5)
    assert torch.allclose(whole.stderr, one.stderr, rtol=1e-4)
    first = pipeline.score(texts[:1], **options)
    assert torch.allclose(first.nats, whole.nats[:1], rtol=1e-5)
    assert not torch.allclose(pipeline.score(texts, **options | {"seed": 6}).nats, whole.nats)
    evaluations = [evaluate(pipeline, texts, batch_size=size, **options) for size in (2, 5)]
    assert evaluations[0].nats == pytest.approx(evaluations[1].nats, rel=1e-5)
    # A byte tokenizer ends no document: evaluation and scores are of the same windows.
    assert evaluations[0].nats == pytest.approx(float(whole.nats.sum()), rel=1e-5)


def test_the_figures_of_samples_count_what_differs() -> None:
    pipeline = tiny()
    samples = pipeline.generate("", n=2, length=4, seed=0)
    figures = sample_figures(samples)
    tokens = [sample.tokens for sample in samples]
    assert figures["calls"] == 4
    assert figures["distinct_1"] == len({*tokens[0], *tokens[1]}) / 8
    assert figures["distinct_3"] == 1.0
