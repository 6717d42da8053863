"""Defaults of the process, of torch and of other threads, change nothing that is drawn."""

from __future__ import annotations

import threading

import pytest
import torch

import mdiff
from mdiff import Pipeline, TokenSpace
from mdiff.backbones.transformer import transformer
from mdiff.modalities.ids import ids
from mdiff.ops import BACKENDS, draw, reveal

OPTIONS = [
    {"sampler": "first_hitting"},
    {"sampler": "first_hitting", "per_call": 3},
    {"sampler": "ancestral", "steps": 8},
    {"sampler": "any_order", "order": "random"},
    {"sampler": "confidence", "steps": 8, "noise": 2.0},
    {"sampler": "confidence", "threshold": 0.3},
    {"sampler": "halton", "steps": 5},
    {"sampler": "amused", "steps": 7},
    {"sampler": "confidence", "steps": 3, "noise": [1.7, 0.3, 0.1]},
    {"sampler": "blocks", "block_length": 8},
    {"guidance_scale": 1.5, "guidance_schedule": "linear"},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
]
DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def defaults():
    """A function that sets the process's default type and device; both are put back."""
    kind = torch.get_default_dtype()

    def choose(dtype=None, device=None):
        if dtype is not None:
            torch.set_default_dtype(dtype)
        if device is not None:
            torch.set_default_device(device)

    yield choose
    torch.set_default_dtype(kind)
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def model():
    """A small model of plain ids."""
    torch.manual_seed(0)
    denoiser = transformer(vocab_size=300, width=32, depth=2, heads=2).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    space = TokenSpace(300, mask_id=300)
    return Pipeline(denoiser, space, ids(vocab_size=300, mask_id=300), window=32)


def figures(samples):
    return [(one.tokens, one.log_prob, one.entropy, one.calls) for one in samples]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_generation_is_the_same_under_other_defaults(model, defaults, options):
    expected = figures(model.generate("5 7", length=24, n=2, seed=3, **options))
    for dtype in DTYPES:
        defaults(dtype)
        assert figures(model.generate("5 7", length=24, n=2, seed=3, **options)) == expected
    defaults(torch.float32, "meta")
    assert figures(model.generate("5 7", length=24, n=2, seed=3, **options)) == expected


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("measure", ["model", "drawn"])
def test_a_draw_is_the_same_under_other_defaults(defaults, backend, kind, measure):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 1500, generator=generator).to(kind)
    if backend == "reference":
        logits = logits[:4, :40]
    span = (3, logits.shape[1])
    options = {
        "seed": 7, "span": span, "never": (5,), "top_k": 9, "temperature": 0.8,
        "measure": measure, "unconditional": logits.flip(0), "guidance_scale": 1.7,
        "backend": backend,
    }  # fmt: skip
    expected = draw(logits, **options)
    for dtype, device in [(dtype, None) for dtype in DTYPES] + [(torch.float32, "meta")]:
        defaults(dtype, device)
        found = draw(logits, **options)
        for ours, theirs in zip(found, expected):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_a_reveal_is_the_same_under_other_defaults(defaults):
    tokens = torch.full((2, 6), 9)
    asked = torch.tensor([[True] * 6, [False, True, True, False, True, True]])
    generator = torch.Generator().manual_seed(2)
    drawn = draw(torch.randn(10, 9, generator=generator), seed=1)
    count = torch.tensor([2, 3])
    expected = reveal(tokens, asked, drawn, drawn.log_prob, count=count, threshold=-1.0)
    for dtype, device in [(dtype, None) for dtype in DTYPES] + [(torch.float32, "meta")]:
        defaults(dtype, device)
        found = reveal(tokens, asked, drawn, drawn.log_prob, count=count, threshold=-1.0)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


def test_a_score_is_the_same_under_other_defaults(model, defaults):
    expected = model.score(["5 7 9 11", "8 3"], draws=4)
    for dtype, device in [(dtype, None) for dtype in DTYPES] + [(torch.float32, "meta")]:
        defaults(dtype, device)
        found = model.score(["5 7 9 11", "8 3"], draws=4)
        assert torch.equal(found.nats, expected.nats)
        assert torch.equal(found.stderr, expected.stderr)


def test_pictures_are_the_same_under_other_defaults(defaults):
    model = mdiff.load("builtin:fashion", device="cpu")
    asked = {"label": "sneaker"}
    options = {"sampler": "halton", "steps": 4, "guidance_scale": 2.0, "n": 2, "seed": 1}
    expected = model.generate(asked, **options)
    for dtype, device in [(dtype, None) for dtype in DTYPES] + [(torch.float32, "meta")]:
        defaults(dtype, device)
        found = model.generate(asked, **options)
        assert figures(found) == figures(expected)
        assert all(a.output.tobytes() == b.output.tobytes() for a, b in zip(found, expected))


def test_models_that_ship_load_the_same_under_other_default_types(defaults):
    expected = mdiff.load("builtin:shakespeare", device="cpu")
    for dtype in (torch.float64, torch.bfloat16):
        defaults(dtype)
        found = mdiff.load("builtin:shakespeare", device="cpu")
        assert torch.get_default_dtype() == dtype
        for ours, theirs in zip(found.denoiser.parameters(), expected.denoiser.parameters()):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_loading_beside_generation_changes_neither():
    model = mdiff.load("builtin:shakespeare", device="cpu")
    options = {"length": 12, "seed": 3, "sampler": "confidence", "steps": 4}
    expected = figures(model.generate("To be", **options))
    loader = threading.Thread(
        target=lambda: [mdiff.load("builtin:shakespeare", device="cpu") for _ in range(4)]
    )
    loader.start()
    found = []
    while loader.is_alive():
        found.append(figures(model.generate("To be", **options)))
    loader.join()
    assert all(one == expected for one in found)
    assert torch.get_default_dtype() == torch.float32


def tiny_models(folder):
    """Directories of masked language models of two types, by that type."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "mask_token_id": 39}  # fmt: skip
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        found[dtype] = folder / str(dtype).removeprefix("torch.")
        BertForMaskedLM(BertConfig(**sizes)).to(dtype).save_pretrained(found[dtype])
    return found


def test_models_of_two_types_load_side_by_side(tmp_path):
    problems = []

    def load(dtype, folder):
        try:
            for _ in range(8):
                loaded = mdiff.load(folder, device="cpu", mask_id=39)
                problems.extend(p.dtype for p in loaded.denoiser.parameters() if p.dtype != dtype)
        except mdiff.MdiffError as error:
            problems.append(error)

    threads = [threading.Thread(target=load, args=each) for each in tiny_models(tmp_path).items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert torch.get_default_dtype() == torch.float32
