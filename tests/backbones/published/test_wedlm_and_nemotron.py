"""WeDLM and Nemotron-Labs-Diffusion against their published code: logits and generations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoder_checkpoints import GOLDEN, copied, loaded
from safetensors.torch import load_file

import mdiff
from mdiff.samplers.blocks import blocks
from mdiff.samplers.confidence import confidence
from mdiff.tokens import TokenSpace

ATOL = 1e-4


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def record(name):
    return load_file(GOLDEN / name / "golden.safetensors")


def test_wedlms_hidden_positions_attend_to_all_written_ones():
    model, held = loaded(GOLDEN / "wedlm"), record("wedlm")
    model.block_length = None
    assert torch.allclose(model(held["clean.input_ids"]), held["clean.logits_raw"], atol=ATOL)
    for row in range(2):
        logits = model(held[f"window.input_ids{row}"][None])[0]
        order = held["window.reordered_positions"][row]
        assert torch.allclose(logits[order], held["window.logits"][row], atol=ATOL)


@pytest.mark.parametrize(("case", "threshold"), [
    ("p0.thr0.0", None), ("p0.thr0.5", 0.5), ("p1.thr0.0", None), ("p1.thr0.5", 0.5),
])  # fmt: skip
def test_wedlm_writes_the_official_tokens_call_by_call(case, threshold):
    model, held = loaded(GOLDEN / "wedlm"), record("wedlm")
    # Its blocks begin behind the prompt.
    model.block_length = None
    prompt, output = held[f"gen.prompt{case[1]}"], held[f"gen.{case}.output"]
    ids, positions = held[f"gen.{case}.fed_ids"], held[f"gen.{case}.fed_positions"]
    canvas = torch.full((len(ids) + 1, output.shape[1]), model.mask_id)
    for call, (tokens, at) in enumerate(zip(ids, positions)):
        canvas[call, at[at >= 0]] = tokens[at >= 0]
    canvas[-1] = output
    assert torch.equal(canvas[0, : prompt.shape[1]], prompt[0])
    states = blocks(
        model, canvas[:1], space=TokenSpace(112, mask_id=107), temperature=0.0, inner=confidence,
        block_length=6, threshold=threshold,
    )  # fmt: skip
    assert torch.equal(torch.cat([state.tokens for state in states]), canvas[1:])


def test_the_first_token_of_nemotrons_block_comes_from_the_causal_row_before():
    model, held = loaded(GOLDEN / "nemotron_labs_diffusion"), record("nemotron_labs_diffusion")
    tokens, first = held["input_ids"], torch.arange(32) % 8 == 0
    assert (model.block_length, model.shifted, model.block_seed) == (8, False, True)
    logits, draft = model(tokens), held["logits_draft"]
    assert torch.allclose(logits[:, ~first], draft[:, ~first], atol=ATOL)
    assert torch.allclose(logits[:, 8::8], draft[:, 7:-1:8], atol=ATOL)
    assert torch.allclose(logits[:, 24], held["logits_causal"][:, 23], atol=ATOL)


def test_a_block_of_one_is_nemotrons_autoregressive_model(tmp_path):
    held, folder = record("nemotron_labs_diffusion"), GOLDEN / "nemotron_labs_diffusion"
    tokens, causal = held["input_ids"], held["logits_causal"]
    for described in ({"dlm_paradigm": "autoregressive"}, {"block_size": 1}):
        name = tmp_path / next(iter(described))
        model = loaded(copied(folder, name, described=described))
        assert torch.allclose(model(tokens)[:, 1:], causal[:, :-1], atol=ATOL)
    prompt = tokens[:1, :24]
    canvas = torch.full((1, 32), 100)
    canvas[:, :24] = prompt
    space = TokenSpace(110, mask_id=100)
    found = mdiff.sample(model, canvas, space=space, sampler="any_order", temperature=0.0).tokens
    for end in range(24, 32):
        # Causal logits are those of the autoregressive reading, one row on.
        row = F.pad(prompt, (0, 1), value=100)
        logits = model(row)[:, end].index_fill(1, torch.tensor([100]), -torch.inf)
        prompt = torch.cat([prompt, logits.argmax(1, keepdim=True)], 1)
    assert torch.equal(found, prompt)


def test_nemotron_in_full_and_in_blocks_is_ministral_under_these_masks(tmp_path):
    held, folder = record("nemotron_labs_diffusion"), GOLDEN / "nemotron_labs_diffusion"
    model = loaded(folder)
    model.block_length = None
    assert torch.allclose(model(held["input_ids"]), held["logits_full"], atol=ATOL)
    blocked = loaded(copied(folder, tmp_path / "b", described={"dlm_paradigm": "block_diff"}))
    assert torch.allclose(blocked(held["input_ids"]), held["logits_block"], atol=ATOL)
