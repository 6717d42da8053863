"""LLaDA-MoE and LLaDA2 against the outputs of their official code, and what both refuse."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from folders import GOLDEN as GOLDEN
from safetensors.torch import load_file, save_file
from torch import nn

import mdiff
from mdiff.backbones.layers.moe import of_experts
from mdiff.errors import CheckpointError, ConfigError
from mdiff.pipeline.published import built

FAMILIES = ("llada_moe", "llada2_moe")
MASK = 62
# In ours, the last digit that the official code's own sums carry.
TOLERANCE = 1e-4


def loaded(name, folder=GOLDEN, **options):
    return mdiff.load(str(folder / name), mask_id=MASK, device="cpu", **options)


def golden(name):
    return load_file(GOLDEN / name / "golden.safetensors")


def described(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


def close(got, expected, within=TOLERANCE):
    torch.testing.assert_close(got, expected, atol=within, rtol=0)


@torch.no_grad()
def test_logits_of_llada_moe_are_the_official_ones():
    record = golden("llada_moe")
    model = loaded("llada_moe").denoiser
    routed = []
    gate = model.model.layers[0].mlp
    gate.register_forward_pre_hook(lambda _, given: routed.append(given[0]))
    close(model(record["input_ids"]), record["logits"])
    close(routed[0].flatten(0, 1) @ gate.gate.weight.T, record["layer0.router_logits"])


@torch.no_grad()
def test_logits_of_llada2_are_the_official_ones_with_blocks_and_without():
    record = golden("llada2_moe")
    tokens = record["input_ids"]
    model = loaded("llada2_moe", block_length=4).denoiser
    routed = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: routed.append(_[2]))
    close(model(tokens), record["logits_block_causal"])
    chosen, weights = routed[0]
    order, expected = chosen.argsort(1), record["layer1.topk_index"].argsort(1)
    assert torch.equal(chosen.gather(1, order), record["layer1.topk_index"].gather(1, expected))
    close(weights.gather(1, order), record["layer1.topk_weight"].gather(1, expected))
    model.block_length = tokens.shape[1]
    close(model(tokens), record["logits_full"])


def test_the_block_of_a_llada2_is_the_configs_or_the_trained_one():
    assert built("llada2_moe", described("llada2_moe")).block_length == 32
    assert built("llada2_moe", described("llada2_moe") | {"block_size": 8}).block_length == 8
    with pytest.raises(ConfigError, match="block_length=0"):
        loaded("llada2_moe", block_length=0)
    with pytest.raises(ConfigError, match="not a block model"):
        loaded("llada_moe", block_length=4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padded_rows_have_the_logits_of_single_ones(name):
    model = loaded(name, **({"block_length": 4} if name == "llada2_moe" else {})).denoiser
    whole = golden(name)["input_ids"]
    short = whole[1, :9]
    for left in (True, False):
        positions = slice(whole.shape[1] - 9, None) if left else slice(0, 9)
        tokens = whole.clone()
        tokens[1] = 60
        tokens[1, positions] = short
        valid = torch.ones_like(tokens, dtype=torch.bool)
        valid[1] = False
        valid[1, positions] = True
        logits = model(tokens, valid=valid)
        close(logits[0], model(whole[:1])[0], 1e-5)
        close(logits[1, positions], model(short[None])[0], 1e-5)
        at = torch.zeros_like(valid)
        at[0, 3] = at[1, positions.start + 2] = True
        close(model(tokens, valid=valid, at=at), logits[at], 1e-5)


@torch.no_grad()
def test_packed_documents_have_the_logits_of_single_ones():
    model = loaded("llada2_moe", block_length=4).denoiser
    tokens = golden("llada2_moe")["input_ids"]
    packed = torch.cat([tokens[0, :6], tokens[1, :9]])[None]
    documents = torch.tensor([[0] * 6 + [1] * 9])
    logits = model(packed, documents=documents)[0]
    close(logits[:6], model(tokens[:1, :6])[0], 1e-5)
    close(logits[6:], model(tokens[1:, :9])[0], 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    loaded(name).denoiser.save_pretrained(tmp_path / "saved")
    first = load_file(GOLDEN / name / "model.safetensors")
    second = load_file(tmp_path / "saved" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == described(name)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_every_tensor_is_accounted_for(name, fault, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    path = tmp_path / name / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    if fault == "missing":
        del tensors[key]
    elif fault == "unexpected":
        key = "model.layers.1.mlp.experts.8.up_proj.weight"
        tensors[key] = torch.zeros(16, 32)
    else:
        tensors[key] = torch.zeros(32, 16)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"{fault}: {key}"):
        loaded(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("llada_moe", "num_experts", 10**9),
        ("llada_moe", "num_hidden_layers", 10**6),
        ("llada_moe", "hidden_size", -32),
        ("llada_moe", "vocab_size", "64"),
        ("llada_moe", "num_experts_per_tok", 9),
        ("llada_moe", "num_key_value_heads", 3),
        ("llada_moe", "num_attention_heads", 5),
        ("llada_moe", "moe_layer_freq", [1]),
        ("llada_moe", "norm_topk_prob", True),
        ("llada_moe", "clip_qkv", 8.0),
        ("llada_moe", "rope_scaling", {"type": "linear"}),
        ("llada_moe", "rope_theta", 0.0),
        ("llada_moe", "shared_expert_intermediate_size", 16),
        ("llada_moe", "hidden_act", "gelu"),
        ("llada2_moe", "num_experts", 2**40),
        ("llada2_moe", "n_group", 3),
        ("llada2_moe", "topk_group", 5),
        ("llada2_moe", "score_function", "softmax"),
        ("llada2_moe", "norm_topk_prob", False),
        ("llada2_moe", "use_qk_norm", False),
        ("llada2_moe", "use_qkv_bias", True),
        ("llada2_moe", "tie_word_embeddings", True),
        ("llada2_moe", "partial_rotary_factor", 0.4),
        ("llada2_moe", "head_dim", 2**40),
        ("llada2_moe", "rope_scaling", {"rope_type": "yarn"}),
        ("llada2_moe", "block_length", 0),
    ],
)
def test_a_config_that_is_absurd_or_not_supported_is_refused_by_the_entry(name, entry, value):
    with pytest.raises(CheckpointError, match=entry):
        built(name, described(name) | {entry: value})


def test_more_experts_than_any_model_has_are_refused_at_once():
    with pytest.raises(CheckpointError, match="num_experts=4096 in each of 256 layers"):
        built("llada_moe", described("llada_moe") | {
            "num_experts": 4096, "num_hidden_layers": 256, "moe_layer_freq": [1] * 256
        })  # fmt: skip


def test_a_layer_without_experts_is_one_gated_layer():
    dense = built("llada_moe", described("llada_moe") | {"moe_layer_freq": [0, 1]})
    names = [name for name in dense.state_dict() if name.startswith("model.layers.0.mlp")]
    assert names == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]


def test_each_expert_runs_once_on_its_own_tokens():
    torch.manual_seed(0)
    calls = []

    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            calls.append((self.factor, len(x)))
            return x * self.factor

    experts = [Scaled(factor) for factor in (1.0, 10.0, 100.0, 1000.0)]
    x = torch.randn(5, 3)
    chosen = torch.tensor([[0, 2], [2, 0], [0, 1], [1, 0], [2, 1]])
    weights = torch.rand(5, 2)
    factor = torch.tensor([e.factor for e in experts])[chosen]
    expected = x * (weights * factor).sum(1, keepdim=True)
    torch.testing.assert_close(of_experts(x, experts, chosen, weights), expected)
    assert calls == [(1.0, 4), (10.0, 3), (100.0, 3)]


@torch.no_grad()
def test_half_precision_stays_half_and_routes_in_float32():
    model = loaded("llada2_moe", dtype="bfloat16", block_length=4).denoiser
    routed = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: routed.append(_[2]))
    assert model(golden("llada2_moe")["input_ids"]).dtype == torch.bfloat16
    assert routed[0][1].dtype == torch.float32


@pytest.mark.parametrize("name", FAMILIES)
def test_rope_scaling_of_a_config_stretches_the_positions(name):
    linear = {"rope_type": "linear", "factor": 2.0}
    plain, scaled = (
        built(name, described(name) | more).rotary for more in ({}, {"rope_scaling": linear})
    )
    at = torch.arange(8)[None]
    for ours, expected in zip(scaled.tables(2 * at, 8), plain.tables(at, 8)):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
