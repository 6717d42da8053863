"""Models that write block after block, against their published code: logits, traces, files."""

from __future__ import annotations

import json

import pytest
import torch
from decoder_checkpoints import (
    GOLDEN,
    assert_damage_is_refused,
    assert_rows_do_not_depend_on_padding,
    assert_saving_gives_the_files_back,
    copied,
    loaded,
)
from safetensors.torch import load_file

import mdiff
from mdiff.denoiser import guided
from mdiff.errors import CheckpointError
from mdiff.pipeline.published import built
from mdiff.samplers.any_order import any_order
from mdiff.samplers.blocks import blocks
from mdiff.samplers.confidence import confidence
from mdiff.tokens import TokenSpace

ATOL = 1e-4
NAMES = {
    "sdar": "model.layers.1.self_attn.q_norm.weight",
    "sdar_moe": "model.layers.1.mlp.experts.4.up_proj.weight",
    "fast_dllm_v2": "model.layers.1.self_attn.k_proj.bias",
    "wedlm": "model.layers.1.self_attn.k_norm.weight",
    "nemotron_labs_diffusion": "encoder.layers.1.mlp.up_proj.weight",
}
FAST = load_file(GOLDEN / "fast_dllm_v2/golden.safetensors")
FAST_MASK = 105
SDAR = load_file(GOLDEN / "sdar/golden.safetensors")
CASES = sorted({name.rpartition(".")[0] for name in SDAR if name.endswith(".store_kv")})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def record(name):
    return load_file(GOLDEN / name / "golden.safetensors")


def sdar_states(model, canvas, length, *, steps=None, inner=confidence, **options):
    """The states of a generation at temperature 0 in blocks of `length`."""
    model.block_length, space = length, TokenSpace(model.vocab_size, mask_id=model.mask_id)
    given = {} if inner is any_order else {"counts": "even", "steps": steps or length}
    return list(
        blocks(
            model, canvas, space=space, temperature=0.0, inner=inner, block_length=length,
            **given, **options,
        )
    )  # fmt: skip


RULES = {
    "static": {}, "static_few": {"steps": 3}, "dynamic": {"threshold": 0.35},
    "dynamic_hi": {"threshold": 0.6}, "sequential": {"inner": any_order},
}  # fmt: skip


@pytest.mark.parametrize("family", NAMES)
def test_saving_gives_the_files_back_and_damage_is_refused(tmp_path, family):
    assert_saving_gives_the_files_back(GOLDEN / family, tmp_path / "saved")
    assert_damage_is_refused(GOLDEN / family, tmp_path, name=NAMES[family])


@pytest.mark.parametrize("family", NAMES)
def test_rows_do_not_depend_on_padding(family):
    # Fast-dLLM's logits are up to 13.
    assert_rows_do_not_depend_on_padding(
        loaded(GOLDEN / family), length=11, ids=90, side="left", atol=5e-5
    )  # fmt: skip


def test_logits_of_sdar_are_the_official_ones_in_blocks_of_any_length_and_in_full():
    model, tokens = loaded(GOLDEN / "sdar"), SDAR["input_ids"]
    for length, name in ((4, "b4.logits"), (8, "b8.logits"), (None, "logits_full")):
        model.block_length = length
        assert torch.allclose(model(tokens), SDAR[name], atol=ATOL)


def test_logits_and_router_of_the_mixture_are_those_of_qwen3s():
    model, held = loaded(GOLDEN / "sdar_moe"), record("sdar_moe")
    routed = []
    gate = model.model["layers"][0].mlp
    gate.register_forward_pre_hook(lambda _, given: routed.append(given[0]))
    assert torch.allclose(model(held["input_ids"]), held["logits_block"], atol=ATOL)
    logits = routed[0].flatten(0, 1) @ gate.gate.weight.T
    assert torch.allclose(logits, held["layer0.router_logits"], atol=ATOL)
    model.block_length = None
    assert torch.allclose(model(held["input_ids"]), held["logits_full"], atol=ATOL)


@pytest.mark.parametrize("case", CASES)
def test_sdar_writes_the_official_tokens_call_by_call(case):
    model, length = loaded(GOLDEN / "sdar"), int(case.split(".")[1][1:])
    prompt, output = SDAR[f"gen.prompt{case.split('.')[2][1:]}"], SDAR[f"{case}.output"]
    canvas = torch.full_like(output, model.mask_id)
    canvas[:, : prompt.shape[1]] = prompt
    states = sdar_states(model, canvas, length, **RULES[case.split(".")[3]])
    asked = [call for call, kept in enumerate(SDAR[f"{case}.store_kv"].tolist()) if not kept]
    assert len(states) == len(asked) == int(states[-1].calls)
    for call, state in zip(asked, states):
        start = int(SDAR[f"{case}.block_start"][call])
        assert torch.equal(state.tokens[0, start : start + length], SDAR[f"{case}.x"][call + 1])
    assert torch.equal(states[-1].tokens, output)


def test_a_stop_id_ends_after_its_block():
    model, output, stop = loaded(GOLDEN / "sdar"), SDAR["gen_stop.output"], SDAR["gen_stop.stop_id"]
    canvas = torch.full_like(output, model.mask_id)
    canvas[:, :3] = SDAR["gen.prompt0"]
    found = sdar_states(model, canvas, 4, stop=int(stop))[-1].tokens
    written = output != model.mask_id
    assert set(written[0].tolist()) == {False, True}
    assert torch.equal(found[written], output[written])
    assert bool((found[~written] == stop).all())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prompt", [0, 2, 4, 5, 11])
def test_where_the_mask_wins_or_a_quota_is_above_what_is_left_all_is_written_once(rule, prompt):
    """The published code crashes or loops there, or overwrites what was given."""
    model = loaded(GOLDEN / "sdar")
    # The mask's logit is above all others at every position.
    features = model.features(SDAR["input_ids"]).flatten(0, 1)
    model.lm_head.weight[model.mask_id] = 100 * features.mean(0)
    canvas = torch.full((1, 13), model.mask_id)
    canvas[:, :prompt] = SDAR["input_ids"][:1, :prompt]
    options = RULES[rule] if rule == "sequential" else RULES[rule] | {"steps": 1}
    assert bool((model(canvas).argmax(2) == model.mask_id)[:, prompt:].all())
    states = sdar_states(model, canvas, 4, **options)
    before = canvas
    for state in states:
        kept = before != model.mask_id
        assert torch.equal(state.tokens[kept], before[kept])
        before = state.tokens
    assert not bool((before == model.mask_id).any())


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("start", [4, 8, 12])
def test_a_step_on_a_block_with_the_cache_gives_the_logits_of_the_whole_canvas(family, start):
    model, tokens = loaded(GOLDEN / family), SDAR["input_ids"] % 88
    model.block_length = 4
    # Later blocks are hidden, as they are when a block is written.
    tokens[:, start + 1 :] = FAST_MASK if model.mask_id is None else model.mask_id
    cache = model.new_cache()
    cache.growing = True
    model(tokens[:, :start], cache=cache)
    cache.growing = False
    block = slice(start, start + 4)
    assert torch.allclose(model(tokens[:, block], cache=cache), model(tokens)[:, block], atol=5e-5)


@pytest.mark.parametrize("architecture", ["SDARForCausalLM", "SDARMoeForCausalLM"])
def test_older_configs_state_neither_block_nor_mask(tmp_path, architecture):
    """Then blocks are 4 long, and the mask is 151669 in a vocabulary that has it."""
    family = "sdar_moe" if "Moe" in architecture else "sdar"
    folder = copied(GOLDEN / family, tmp_path / "old", described={
        "architectures": [architecture], "block_size": None, "mask_token_id": None,
    })  # fmt: skip
    assert (loaded(folder).block_length, loaded(folder).mask_id) == (4, None)
    assert mdiff.load(folder, mask_id=90, block_length=8).denoiser.block_length == 8
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 151936}
    assert built("adapted", config).mask_id == 151669


class Uncached:
    """A block model whose every call is of the whole canvas."""

    uses_time = False

    def __init__(self, model):
        self.model, self.block_length = model, model.block_length
        self.block_seed = model.block_seed

    def __call__(self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None):
        return self.model(tokens, at=at, valid=valid)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("options", [{"threshold": 0.3}, {"sub_block_length": 2}, {"steps": 2}])
def test_a_generation_with_the_cache_is_the_one_without(family, options):
    model = loaded(GOLDEN / family)
    model.block_length, mask = 8, FAST_MASK if model.mask_id is None else model.mask_id
    canvas = torch.full((2, 27), mask)
    canvas[:, :11] = torch.randint(80, (2, 11), generator=torch.Generator().manual_seed(1))
    canvas[1, 8:13] = 3
    found = [
        list(
            blocks(
                denoiser, canvas, space=TokenSpace(model.vocab_size, mask_id=mask), seed=4,
                block_length=8, inner=confidence, **options,
            )
        )
        for denoiser in (model, Uncached(model))
    ]  # fmt: skip
    ours, theirs = found
    assert len(ours) == len(theirs)
    assert torch.equal(ours[-1].tokens, theirs[-1].tokens)
    assert torch.equal(ours[-1].calls, theirs[-1].calls)
    assert not bool((ours[-1].tokens == mask).any())


@pytest.mark.parametrize("family", NAMES)
def test_a_pipeline_generates_scores_and_is_saved_whichever_way_the_mask_is_known(tmp_path, family):
    """The mask's id is given here, and is in no config; some attend by what is hidden."""
    folder = copied(GOLDEN / family, tmp_path / "m", described={"mask_token_id": None})
    mask = loaded(GOLDEN / family).mask_id or FAST_MASK
    pipeline = mdiff.load(folder, mask_id=mask)
    options = {"length": 20, "seed": 1, "sampler": "confidence", "threshold": 0.4}
    (sample,) = pipeline.generate("3 1 4 1 5 9", **options)
    assert len(sample.tokens) == 20
    assert mask not in sample.tokens
    pipeline.save(tmp_path / "saved")
    again = mdiff.load(tmp_path / "saved")
    (same,) = again.generate("3 1 4 1 5 9", **options)
    assert list(same.tokens) == list(sample.tokens)
    tokens = torch.where(torch.arange(16) % 3 > 0, SDAR["input_ids"] % 88, mask)
    expected = loaded(GOLDEN / family)(tokens)
    for denoiser in (pipeline.denoiser, again.denoiser):
        assert torch.equal(denoiser(tokens), expected)
    assert 0 < float(pipeline.score("3 1 4 1 5 9 2 6 5 3 5", draws=8).nats) < torch.inf


@pytest.mark.parametrize("options", [{"cfg_scale": 0.5}, {"cfg_scale": 0.0}])
def test_a_guided_model_still_takes_the_first_token_from_the_block_before(options):
    model, space = loaded(GOLDEN / "fast_dllm_v2"), TokenSpace(112, mask_id=FAST_MASK)
    model.block_length, canvas = 8, torch.full((1, 24), FAST_MASK)
    canvas[:, :11] = FAST["input_ids"][:1, :11]
    both = guided(model, hide="given", space=space, **options)
    first, *_ = (
        state
        for state in blocks(
            both, canvas, space=space, cond={"given": canvas != FAST_MASK}, temperature=0.0,
            inner=confidence, block_length=8, threshold=0.3,
        )
        if bool(state.revealed[0, 16])
    )  # fmt: skip
    assert first.revealed[0].nonzero().flatten().tolist() == [16]


@pytest.mark.parametrize(("family", "entry", "said"), [
    ("wedlm", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("wedlm", {"qk_norm": "yes"}, "qk_norm"),
    ("nemotron_labs_diffusion", {"dlm_paradigm": "sbd_block_diff"}, "dlm_paradigm"),
    ("nemotron_labs_diffusion", {"sliding_window": 32}, "sliding_window"),
    ("nemotron_labs_diffusion", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ("nemotron_labs_diffusion", {"rope_parameters": {"rope_type": "yarn"}}, "factor"),
    ("sdar", {"block_size": 0}, "block_size"),
    ("sdar", {"mask_token_id": 120}, "mask_token_id"),
    ("sdar", {"use_sliding_window": True}, "use_sliding_window"),
    ("sdar", {"hidden_act": "gelu"}, "hidden_act"),
    ("sdar", {"rope_scaling": {"rope_type": "dynamic"}}, "rope_type"),
    ("sdar", {"rope_scaling": []}, r"rope_scaling=\[\]"),
    ("sdar", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("nemotron_labs_diffusion", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("wedlm", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ("wedlm", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("fast_dllm_v2", {"quantization_config": True}, "quantization_config"),
    ("fast_dllm_v2", {"bd_size": "32"}, "bd_size"),
    ("fast_dllm_v2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("sdar_moe", {"mlp_only_layers": "all"}, "mlp_only_layers"),
    ("sdar_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ("sdar_moe", {"norm_topk_prob": None}, "norm_topk_prob"),
    ("sdar_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
])  # fmt: skip
def test_options_that_are_not_supported_are_refused_by_name(tmp_path, family, entry, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        loaded(copied(GOLDEN / family, tmp_path / "other", described=entry))
    assert caught.value.exit_code == 4
