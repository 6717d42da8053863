"""Finished blocks of a block model, kept: same logits, same samples, same calls as without."""

from __future__ import annotations

import json

import pytest
import torch
from folders import GOLDEN as GOLDEN_FOLDER

import mdiff
from mdiff.denoiser import guided
from mdiff.errors import ConfigError
from mdiff.pipeline.published import built
from mdiff.samplers.blocks import blocks
from mdiff.samplers.confidence import confidence
from mdiff.tokens import TokenSpace

GOLDEN = GOLDEN_FOLDER / "llada2_moe"
SPACE = TokenSpace(64, mask_id=62)
BLOCK = 4


class Plain:
    """The same model without a cache: the whole canvas in every call."""

    uses_time = False

    def __init__(self, model):
        self.model, self.block_length, self.sizes = model, model.block_length, []

    def __call__(self, tokens, **rest):
        self.sizes.append(tokens.shape[1])
        return self.model(tokens, **rest)


def golden_model():
    return mdiff.load(str(GOLDEN), mask_id=62, block_length=BLOCK, device="cpu").denoiser


def random_model():
    """Three layers of other sizes, the first dense, with weights of its own."""
    config = json.loads((GOLDEN / "config.json").read_text()) | {
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
        "hidden_size": 24, "block_length": 5,
    }  # fmt: skip
    model = built("llada2_moe", config).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            around = 1.0 if "norm" in name else 0.0
            spread = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(around + spread * (0.1 if tensor.dim() == 1 else 0.3))
    return model


MODELS = {"golden": golden_model, "random": random_model}


def canvas(length=18, rows=3):
    """Rows that are given 1, 6, 11, ... tokens, and one token in the middle of the rest.

    In a block of masks alone all positions are alike: rounding would choose a greedy token.
    """
    tokens = torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    for row in range(rows):
        tokens[row, 1 + 5 * row :] = SPACE.mask_id
    tokens[:, 13] = 7
    return tokens


def finished(denoiser, tokens, **options):
    return mdiff.sample(
        denoiser, tokens, space=SPACE, sampler="blocks", block_length=denoiser.block_length,
        **options,
    )  # fmt: skip


OPTIONS = {
    "greedy": {"inner": confidence, "temperature": 0.0},
    "two steps": {"inner": confidence, "steps": 2, "counts": "even"},
    "threshold": {"inner": confidence, "threshold": 0.2, "temperature": 0.0},
    "first hitting": {"temperature": 1.0, "seed": 5},
    "stop": {"temperature": 1.0, "seed": 5, "stop": 30},
}


@pytest.mark.parametrize("length", [16, 18])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_samples_and_calls_are_those_of_the_full_recompute(kind, options, length):
    model = MODELS[kind]()
    kept = finished(model, canvas(length), **options)
    plain = Plain(model)
    whole = finished(plain, canvas(length), **options)
    assert set(plain.sizes) == {length}
    assert torch.equal(kept.tokens, whole.tokens)
    assert torch.equal(kept.calls, whole.calls)
    torch.testing.assert_close(kept.log_prob, whole.log_prob, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_logits_behind_a_cache_are_those_of_the_whole_row(kind):
    model = MODELS[kind]()
    block = model.block_length
    tokens = canvas(3 * block + 2)
    whole = model(tokens)
    cache = model.new_cache()
    # Two blocks at once and then one: what is kept does not depend on how it grew.
    for start, stop in ((0, 2 * block), (2 * block, 3 * block)):
        cache.growing = True
        model(tokens[:, start:stop], cache=cache)
        cache.growing = False
        assert cache.length == stop
        end = min(stop + block, tokens.shape[1])
        behind = model(tokens[:, stop:end], cache=cache)
        torch.testing.assert_close(behind, whole[:, stop:end], atol=1e-5, rtol=0)
        some = torch.tensor([2, 0])
        rows = model(tokens[some, stop:end], cache=cache.of_rows(some))
        torch.testing.assert_close(rows, whole[some, stop:end], atol=1e-5, rtol=0)
    assert cache.length == 3 * block


def test_a_step_runs_on_its_block_alone_and_a_finished_block_once():
    model = golden_model()
    sizes = []
    model.trunk()[0].register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape))
    tokens = canvas(16, rows=1)
    tokens[0, :9] = 3
    result = finished(model, tokens, inner=confidence, temperature=0.0)
    # Positions 9 to 11, 12 and 14 to 15 are hidden: two blocks before are given.
    assert sizes == [(1, 8)] + [(1, 4)] * 3 + [(1, 4)] + [(1, 4)] * 3
    assert result.calls.tolist() == [6]


def test_rows_with_padding_go_the_plain_way_and_sample_as_alone():
    model = golden_model()
    tokens = canvas(16, rows=2)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    padded = torch.cat([torch.full((1, 3), 60), tokens[1:, :13]], 1)
    valid[1, :3] = False
    both = finished(
        model, torch.cat([tokens[:1], padded]), valid=valid, inner=confidence, temperature=0.0
    )
    first = finished(model, tokens[:1], inner=confidence, temperature=0.0)
    second = finished(model, tokens[1:, :13], inner=confidence, temperature=0.0)
    assert torch.equal(both.tokens[:1], first.tokens)
    assert torch.equal(both.tokens[1:, 3:], second.tokens)
    with pytest.raises(ConfigError, match="without padding"):
        model(tokens, valid=valid, cache=model.new_cache())


def test_guidance_keeps_nothing_and_fills_the_models_own_blocks():
    model = golden_model()
    tokens = canvas(16, rows=2)
    pair = guided(model, guidance_scale=1.5, hide="given", space=SPACE)
    cond = {"given": tokens != SPACE.mask_id}
    states = list(blocks(pair, tokens, space=SPACE, block_length=BLOCK, cond=cond, temperature=0.0))
    assert not (states[-1].tokens == SPACE.mask_id).any()
    for state in states:
        assert len({position // BLOCK for _, position in state.revealed.nonzero().tolist()}) == 1


def test_blocks_of_another_length_are_counted_from_the_first_hidden_position():
    model = golden_model()
    tokens = canvas(16, rows=1)
    tokens[0, :3] = 5
    shown = []
    model.trunk()[0].register_forward_pre_hook(lambda _, given: shown.append(given[0].shape[1]))
    last = list(
        blocks(
            model, tokens, space=SPACE, block_length=2, inner=confidence, steps=1,
            temperature=0.0,
        )
    )  # fmt: skip
    assert set(shown) == {16}
    assert last[0].revealed.nonzero()[:, 1].tolist() == [3, 4]


def test_a_pipeline_fills_the_models_own_blocks_unless_asked_otherwise():
    pipeline = mdiff.load(str(GOLDEN), mask_id=62, block_length=BLOCK, device="cpu")
    sizes = []
    pipeline.denoiser.trunk()[0].register_forward_pre_hook(
        lambda _, given: sizes.append(given[0].shape[1])
    )
    tokens = [[5, 9] + [62] * 10]
    for run in pipeline.runs(tokens, sampler="blocks", temperature=0.0):
        run.finished()
    assert set(sizes) == {BLOCK}


@pytest.mark.parametrize("sampler", ["first_hitting", "confidence", "any_order"])
def test_a_block_model_is_filled_block_by_block_unasked(sampler):
    """A position drawn before its block's turn would have a law that is not the model's."""
    pipeline = mdiff.load(str(GOLDEN), mask_id=62, block_length=BLOCK, device="cpu")
    states = list(pipeline.stream("1 2", length=3 * BLOCK, sampler=sampler, seed=3))
    turns = [int(state.revealed[0].nonzero()[0, 0]) // BLOCK for state in states]
    assert turns == sorted(turns)
    assert set(turns) == {0, 1, 2}


@pytest.mark.parametrize("length", [0, 3, 2 * BLOCK, -1])
def test_blocks_that_do_not_divide_the_models_own_are_refused(length):
    pipeline = mdiff.load(str(GOLDEN), mask_id=62, block_length=BLOCK, device="cpu")
    with pytest.raises(ConfigError, match="block_length"):
        pipeline.generate("1 2", length=3 * BLOCK, block_length=length)


def test_sample_too_fills_a_block_model_block_by_block():
    denoiser = mdiff.load(str(GOLDEN), mask_id=62, block_length=BLOCK, device="cpu").denoiser
    canvas = torch.full((2, 3 * BLOCK), 62)
    canvas[:, 0] = 5
    space = TokenSpace(denoiser.vocab_size, mask_id=62)
    unasked = mdiff.sample(denoiser, canvas, space=space, seed=4)
    named = mdiff.sample(
        denoiser, canvas, space=space, seed=4, sampler="blocks", block_length=BLOCK
    )  # fmt: skip
    assert torch.equal(unasked.tokens, named.tokens)
    assert torch.equal(unasked.calls, named.calls)
