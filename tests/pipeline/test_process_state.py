"""No public call leaves the process changed, also where it is left half-way or fails."""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from toy_training import recipe
from transformers import BertForMaskedLM

import mdiff
from mdiff import Linear, TokenSpace, draw, masked_diffusion_loss, nll_bound, sample, token_nll
from mdiff.backbones.transformer import transformer
from mdiff.cli import run
from mdiff.errors import MdiffError
from mdiff.evaluation import evaluate
from mdiff.modalities.text.modality import text
from mdiff.pipeline.pipeline import Pipeline
from mdiff.training import train

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def process_state():
    """Everything of the process that others rely on, as values that compare."""
    kind, keys, position, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "types": (torch.get_default_dtype(), str(torch.get_default_device())),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "generators": (
            torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), position, rest,
        ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "running": threading.active_count(),
        "signals": [signal.getsignal(number) for number in SIGNALS],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": (torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled),
        "bars": (transformers.logging.is_progress_bar_enabled(), are_progress_bars_disabled()),
        "verbosity": transformers.logging.get_verbosity(),
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    medium = text()
    model = transformer(
        vocab_size=medium.space.vocab_size, width=16, depth=1, heads=2, max_length=32
    )
    return Pipeline(model.eval(), medium.space, medium, Linear(), 32)


def a_few(states, count):
    """The first states of a run, which is then left alone."""
    for _, state in zip(range(count), states):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        del state


def two_at_once(pipeline):
    one, other = (iter(pipeline.stream(prompt, length=4)) for prompt in "ab")
    next(one)
    next(other)
    assert torch.is_grad_enabled()
    list(one)
    assert torch.is_grad_enabled()
    list(other)


def save_and_load(pipeline, folder):
    pipeline.save(folder / "model")
    mdiff.load(folder / "model")


def masked_lm_loaded(pipeline, folder):
    small = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=16,
    )  # fmt: skip
    BertForMaskedLM(small).save_pretrained(folder / "bert")
    before = process_state()
    mdiff.load(folder / "bert", mask_id=29)
    assert process_state() == before


SPACE, TOKENS = TokenSpace(5, mask_id=5), torch.zeros(2, 4, dtype=torch.int64)


def of_toys(name):
    """The tensor functions on a model without weights."""
    model = mdiff.from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
    given = {"space": SPACE, "schedule": Linear(), "seed": 0}
    return {
        "sample": lambda: sample(model, torch.full((2, 4), 5), space=SPACE),
        "loss": lambda: masked_diffusion_loss(model, TOKENS, **given),
        "bound": lambda: nll_bound(model, TOKENS, **given, draws=2),
        "nll": lambda: token_nll(torch.zeros(2, 4, 5), TOKENS, torch.full((2, 4), 5), space=SPACE),
        "draw": lambda: draw(torch.zeros(2, 5), seed=0),
    }[name]()


CALLS = {
    "generate": lambda p, folder: p.generate("a", length=6),
    "confidence": lambda p, folder: p.generate("a", length=6, sampler="confidence", steps=2),
    "infill": lambda p, folder: p.infill("a[MASK:2]b"),
    "stream to its end": lambda p, folder: list(p.stream("a", length=4)),
    "stream left half-way": lambda p, folder: a_few(p.stream("a", length=6), 2),
    "runs left half-way": lambda p, folder: a_few(
        next(iter(p.runs(p.canvases(["a"], length=6)))), 2
    ),
    "two streams at once": lambda p, folder: two_at_once(p),
    "score": lambda p, folder: p.score("abc", draws=2),
    "features": lambda p, folder: p.features(["abc"]),
    "evaluate": lambda p, folder: evaluate(p, ["abc"], draws=2),
    "save, load": save_and_load,
    "train": lambda p, folder: train(
        recipe(steps=2, save_every=1), folder / "run", report=lambda line: None
    ),
    "command": lambda p, folder: run(["tokenizer", "encode", "byte", "abc"]),
    "command that fails": lambda p, folder: run(["generate", str(folder / "none")]),
} | {
    name: lambda p, folder, name=name: of_toys(name)
    for name in ("sample", "loss", "bound", "nll", "draw")
}


@pytest.mark.parametrize("name", CALLS)
def test_a_public_call_leaves_the_process_as_it_was(name, pipeline, tmp_path, capsys):
    before = process_state()
    CALLS[name](pipeline, tmp_path)
    assert process_state() == before


def test_loading_a_model_of_transformers_leaves_the_process_as_it_was(pipeline, tmp_path):
    masked_lm_loaded(pipeline, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, folder: p.generate("a", length=6, sampler="none"),
        lambda p, folder: mdiff.load(folder),
        lambda p, folder: p.score("abc", estimator="none"),
        lambda p, folder: train(recipe(model={"name": "none"}), folder / "run"),
    ],
)
def test_so_does_one_that_fails(wrong, pipeline, tmp_path):
    before = process_state()
    with pytest.raises(MdiffError):
        wrong(pipeline, tmp_path)
    assert process_state() == before


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_calls_work_under_another_default_type(kind, pipeline, tmp_path):
    expected = pipeline.generate("a", length=6)[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        found = pipeline.generate("a", length=6)[0]
        assert (found.tokens, found.log_prob) == (expected.tokens, expected.log_prob)
        assert torch.get_default_dtype() == kind
    finally:
        torch.set_default_dtype(before)
