"""Fast-dLLM v2 against its published code: logits, and generations call by call."""

from __future__ import annotations

import pytest
import torch
from decoder_checkpoints import GOLDEN, loaded
from safetensors.torch import load_file

from mdiff.errors import ConfigError
from mdiff.samplers.blocks import blocks
from mdiff.samplers.confidence import confidence
from mdiff.tokens import TokenSpace

ATOL = 1e-4
FAST = load_file(GOLDEN / "fast_dllm_v2/golden.safetensors")
FAST_MASK = 105
FAST_RULES = {
    "sub8": {"sub_block_length": 8, "threshold": 0.35}, "sub32": {"threshold": 0.9},
    "one_each": {"sub_block_length": 8},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def fast_states(canvas, **options):
    space = TokenSpace(112, mask_id=FAST_MASK)
    return list(
        blocks(
            loaded(GOLDEN / "fast_dllm_v2"), canvas, space=space, temperature=0.0,
            inner=confidence, block_length=32, **options,
        )
    )  # fmt: skip


def fast_canvas(prompt, *, tokens):
    canvas = torch.full((1, -(-tokens // 32) * 32), FAST_MASK)
    canvas[:, : prompt.shape[1]] = prompt
    return canvas


def test_a_row_of_fast_dllm_is_the_official_output_before_it_blocks_included():
    model, tokens = loaded(GOLDEN / "fast_dllm_v2"), FAST["input_ids"]
    assert (model.block_length, model.mask_id) == (32, None)
    logits, inner = model(tokens), torch.arange(64) % 32 > 0
    assert torch.allclose(logits[:, 1:], FAST["logits_raw"][:, :-1], atol=ATOL)
    official = FAST["logits_shifted_per_block"]
    assert torch.allclose(logits[:, inner], official[:, inner], atol=ATOL)
    model.block_length = 8
    raw = FAST["b8.logits_raw"][:, :-1]
    assert torch.allclose(model(tokens[:, :32])[:, 1:], raw, atol=ATOL)


@pytest.mark.parametrize("case", sorted(
    name.rpartition(".")[0] for name in FAST if name.endswith("update_cache")
))  # fmt: skip
def test_fast_dllm_writes_the_official_tokens_call_by_call(case):
    """The first token of a block is a call here, and the last row of a pass there."""
    prompt, output = FAST[f"gen.prompt{case.split('.')[1][1:]}"], FAST[f"{case}.output"]
    canvas = fast_canvas(prompt, tokens=output.shape[1])
    asked = (FAST[f"{case}.update_cache"] == 0).nonzero()[:, 0].tolist()
    fed, start = FAST[f"{case}.x"], prompt.shape[1] // 32 * 32
    for state in fast_states(canvas, **FAST_RULES[case.split(".")[2]]):
        (written,) = state.revealed[0].nonzero(as_tuple=True)
        if written.tolist() == [start + 32]:
            start += 32
            # The last block is not in the official trace, but for its first token.
            if asked:
                assert torch.equal(state.tokens[0, start : start + 32], fed[asked[0]])
            continue
        if asked:
            call = asked.pop(0)
            assert torch.equal(state.tokens[0, start : start + 32], fed[call + 1])
    assert not asked
    assert torch.equal(state.tokens[:, : output.shape[1]], output)


@pytest.mark.parametrize(("case", "length"), [("sub8", 8), ("sub16", 16)])
def test_the_official_code_loses_a_prompt_of_one_block(case, length):
    """It neither caches nor feeds it: its tokens are those of the masks alone."""
    output = FAST[f"gen.p1.{case}.output"]
    states = fast_states(
        torch.full((1, 64), FAST_MASK), sub_block_length=length, threshold=0.35
    )  # fmt: skip
    assert torch.equal(states[-1].tokens, output[:, 32:96])
    canvas = fast_canvas(FAST["gen.prompt1"], tokens=96)
    found = fast_states(canvas, sub_block_length=length, threshold=0.35)[-1].tokens
    assert not torch.equal(found[:, 32:], output[:, 32:96])


def test_fast_dllm_ends_at_the_block_of_a_stop_id():
    output, stop = FAST["gen_stop.output"], int(FAST["gen_stop.stop_token"])
    canvas = fast_canvas(FAST["gen.prompt0"], tokens=96)
    found = fast_states(canvas, stop=stop, **FAST_RULES["sub8"])[-1].tokens
    assert torch.equal(found[:, : output.shape[1]], output)
    assert bool((found[:, 32:] == stop).all())


def test_ragged_prompts_of_a_batch_are_the_official_ones():
    rows, counts = FAST["batch.input_ids"], FAST["batch.seq_len"].tolist()
    canvas = torch.full((3, 10 - min(counts) + 96), FAST_MASK)
    valid = torch.zeros_like(canvas, dtype=torch.bool)
    for number, count in enumerate(counts):
        # Padding in front, of as many tokens as the row is shorter.
        begin = 10 - count
        canvas[number, begin : begin + count] = rows[number, :count]
        valid[number, begin : begin + 96] = True
    canvas = torch.where(valid, canvas, 0)
    found = fast_states(canvas, valid=valid, **FAST_RULES["sub8"])[-1].tokens
    for number, row in enumerate(found):
        output = FAST[f"batch.output{number}"]
        assert torch.equal(row[valid[number]][: len(output)], output)


@pytest.mark.parametrize("length", [0, -8, 5, 64])
def test_a_sub_block_that_does_not_divide_the_block_is_refused(length):
    with pytest.raises(ConfigError, match=f"sub_block_length={length}"):
        fast_states(torch.full((1, 64), FAST_MASK), sub_block_length=length)
