"""LLaDA against the official code: logits, generation, likelihood, files."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from decoder_checkpoints import (
    GOLDEN,
    assert_damage_is_refused,
    assert_rows_do_not_depend_on_padding,
    assert_saving_gives_the_files_back,
    copied,
    loaded,
)
from safetensors.torch import load_file

from mdiff.denoiser import guided
from mdiff.errors import CheckpointError
from mdiff.files import read_model_files
from mdiff.objective.bound import nll_bound
from mdiff.objective.nll import token_nll
from mdiff.pipeline.loading import load
from mdiff.pipeline.published import recognised
from mdiff.samplers.blocks import blocks
from mdiff.samplers.confidence import confidence
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace

FOLDER = GOLDEN / "llada"
MASK = 126
SPACE = TokenSpace(128, mask_id=MASK)
ATOL = 1e-4


@pytest.fixture(scope="module")
def model():
    return loaded(FOLDER)


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_the_config_is_recognised_by_its_architecture():
    assert recognised(read_model_files(FOLDER)) == "llada"


def test_logits_are_the_official_ones(model, golden):
    assert torch.allclose(model(golden["input_ids"]), golden["logits"], atol=ATOL)
    at = torch.zeros_like(golden["input_ids"], dtype=torch.bool)
    at[:, 2::3] = True
    assert torch.allclose(model(golden["input_ids"], at=at), golden["logits"][at], atol=ATOL)


def test_the_stream_is_the_official_one_after_the_last_norm(model, golden):
    assert torch.allclose(
        model.features(golden["input_ids"]), golden["hidden_states.last_normed"], atol=ATOL
    )


def test_padding_in_front_is_as_in_the_official_code(model, golden):
    valid = golden["padded.attention_mask"].bool()
    logits = model(golden["padded.input_ids"], valid=valid)
    assert torch.allclose(logits[valid], golden["padded.logits"][valid], atol=ATOL)
    unmasked = model(golden["padded.input_ids"])
    assert torch.allclose(unmasked, golden["padded.logits_without_mask"], atol=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_padding(model, side):
    assert_rows_do_not_depend_on_padding(model, length=11, ids=126, side=side)


@pytest.mark.parametrize(("name", "steps", "block_length", "cfg_scale"), [
    ("gen.single_block", 8, 12, 0.0),
    ("gen.blocks", 3, 4, 0.0),
    ("gen.blocks_one_per_step", 6, 6, 0.0),
    ("gen.cfg", 3, 4, 1.5),
    ("gen_padded.blocks", 3, 6, 0.0),
    ("gen_padded.cfg", 3, 6, 0.7),
])  # fmt: skip
def test_generate_gives_the_official_tokens_step_by_step(
    model, golden, name, steps, block_length, cfg_scale
):
    trace = golden[f"{name}.x_at_step"]
    canvas, valid = trace[0], None
    if name.startswith("gen_padded"):
        valid = torch.ones_like(canvas, dtype=torch.bool)
        valid[:, :6] = golden["gen_padded.attention_mask"].bool()
    states = blocks(
        guided(model, cfg_scale=cfg_scale, hide="given", space=SPACE),
        canvas, space=SPACE, schedule=Linear(), valid=valid, cond={"given": canvas != MASK},
        temperature=0.0, inner=confidence, block_length=block_length, steps=steps, counts="even",
    )  # fmt: skip
    found = [state.tokens for state in states]
    assert torch.equal(torch.stack(found), trace[1:])
    assert torch.equal(found[-1], golden[f"{name}.output"])


@pytest.mark.parametrize(("mode", "block_length", "options"), [
    ("fixed", 8, {"steps": 4, "counts": "even"}),
    ("fixed1", 4, {"steps": 4, "counts": "even"}),
    ("thr", 8, {"threshold": 0.08}),
    ("thr_hi", 16, {"threshold": 0.2}),
])  # fmt: skip
def test_fast_dllm_without_a_cache_gives_the_same_tokens_in_as_many_calls(
    model, mode, block_length, options
):
    fast = load_file(FOLDER / "golden_fast_dllm.safetensors")
    canvas = F.pad(fast["prompt"], (0, 16), value=MASK)
    states = list(
        blocks(
            model, canvas, space=SPACE, temperature=0.0, inner=confidence,
            block_length=block_length, **options,
        )
    )  # fmt: skip
    assert torch.equal(states[-1].tokens, fast[f"none.{mode}.output"])
    assert torch.equal(states[-1].calls, fast[f"none.{mode}.nfe"].long())


@pytest.mark.parametrize(("prefix", "cfg_scale"), [("ll", 0.0), ("ll_cfg", 0.8)])
def test_likelihood_is_the_official_one_less_the_probability_of_the_mask(
    model, golden, prefix, cfg_scale
):
    """The official loss leaves the mask among the ids; what is generated never is one."""
    answer = golden["ll.answer"]
    tokens = torch.cat([golden["ll.prompt"], answer])[None]
    masks = golden["ll.masks"].bool()
    hidden = F.pad(masks, (4, 0))
    noisy = torch.where(hidden, MASK, tokens)
    denoiser = guided(model, cfg_scale=cfg_scale, hide="given", space=SPACE)
    given = torch.arange(9)[None] < 4
    logits = denoiser(noisy, cond={"given": given.expand_as(noisy)})
    rows = tokens.expand_as(noisy)
    official = F.cross_entropy(logits.mT, rows, reduction="none") * hidden
    peer = golden[f"{prefix}.nll_per_token"]
    assert torch.allclose(official[:, 4:], peer, rtol=1e-5, atol=1e-6)
    of_mask = logits.double().softmax(2)[..., MASK]
    ours = token_nll(logits, rows, noisy, space=SPACE)
    assert torch.allclose(ours.double(), (official + torch.log1p(-of_mask)) * hidden, atol=1e-5)
    # k uniform in 1..5, a uniform k-subset, weight 5 / k: each mask weighs 1 / (k C(5, k)).
    sizes = masks.sum(1)
    subsets = torch.tensor([1.0, 5, 10, 10, 5, 1], dtype=torch.float64)
    share = 1 / (sizes * subsets[sizes])
    expected = (share * official.double().sum(1)).sum()
    bound = golden[f"{prefix}.exact_log_likelihood_bound"]
    assert float(expected) == pytest.approx(-float(bound), rel=1e-5)
    exact = nll_bound(
        denoiser, tokens, space=SPACE, schedule=Linear(), estimator="exact", draws=1, seed=0,
        may_hide=~given, cond={"given": given},
    )  # fmt: skip
    assert float(exact.nats) == pytest.approx(float((share * ours.double().sum(1)).sum()), rel=1e-5)
    assert list(map(tuple, masks.tolist())) == [
        tuple(i in subset for i in range(5))
        for size in range(1, 6)
        for subset in itertools.combinations(range(5), size)
    ]


def test_saving_gives_the_files_back(tmp_path):
    assert_saving_gives_the_files_back(FOLDER, tmp_path / "saved")


def test_damaged_files_are_refused(tmp_path):
    assert_damage_is_refused(FOLDER, tmp_path, name="model.transformer.blocks.1.ff_out.weight")


@pytest.mark.parametrize(("entry", "said"), [
    ({"d_model": 1 << 40}, "d_model"),
    ({"n_layers": 10**9}, "n_layers"),
    ({"n_kv_heads": 3}, "n_kv_heads"),
    ({"weight_tying": "yes"}, "weight_tying"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type"),
    ({"n_kv_heads": None, "multi_query_attention": True}, "multi_query_attention"),
    ({"attention_layer_norm": True}, "attention_layer_norm"),
    ({"block_type": "sequential"}, "block_type"),
    ({"layer_norm_type": "default"}, "layer_norm_type"),
    ({"rope": False}, "rope"),
    ({"mask_token_id": 128}, "mask_token_id"),
    ({"mlp_hidden_size": None}, "mlp_hidden_size"),
])  # fmt: skip
def test_configs_that_are_not_supported_are_refused_by_name(tmp_path, entry, said):
    with pytest.raises(CheckpointError, match=said):
        loaded(copied(FOLDER, tmp_path / "other", described=entry))


def test_a_pipeline_knows_the_mask_and_generates():
    pipeline = load(FOLDER)
    assert pipeline.space == SPACE
    assert pipeline.window == 64
    (sample,) = pipeline.generate(length=9, sampler="confidence", temperature=0.0)
    assert len(sample.tokens) == 9
    assert MASK not in sample.tokens


def test_a_saved_pipeline_is_loaded_again(tmp_path, golden):
    load(FOLDER).save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.space == SPACE
    assert torch.allclose(again.denoiser(golden["input_ids"]), golden["logits"], atol=ATOL)


@pytest.mark.parametrize(("name", "steps", "block_length", "cfg_scale"), [
    ("gen.single_block", 8, 12, 0.0),
    ("gen.blocks", 3, 4, 0.0),
    ("gen.blocks_one_per_step", 6, 6, 0.0),
    ("gen.cfg", 3, 4, 1.5),
])  # fmt: skip
def test_tied_embeddings_and_fewer_key_heads_give_the_official_tokens(
    name, steps, block_length, cfg_scale
):
    tied, record = (
        loaded(GOLDEN / "llada_tied"),
        load_file(GOLDEN / "llada_tied/golden.safetensors"),
    )
    space, trace = TokenSpace(120, mask_id=tied.mask_id), record[f"{name}.x_at_step"]
    states = blocks(
        guided(tied, cfg_scale=cfg_scale, hide="given", space=space), trace[0], space=space,
        cond={"given": trace[0] != tied.mask_id}, temperature=0.0, inner=confidence,
        block_length=block_length, steps=steps, counts="even", schedule=Linear(),
    )  # fmt: skip
    assert torch.equal(torch.stack([state.tokens for state in states]), trace[1:])


def test_tied_logits_are_the_official_ones_and_no_head_is_stored(tmp_path):
    folder = GOLDEN / "llada_tied"
    tied, record = loaded(folder), load_file(folder / "golden.safetensors")
    valid = record["padded.attention_mask"].bool()
    assert torch.allclose(tied(record["input_ids"]), record["logits"], atol=ATOL)
    padded = tied(record["padded.input_ids"], valid=valid)[valid]
    assert torch.allclose(padded, record["padded.logits"][valid], atol=ATOL)
    assert tied.head.weight is tied.trunk()[0].weight
    assert_saving_gives_the_files_back(folder, tmp_path / "saved")
    assert_damage_is_refused(folder, tmp_path, name="model.transformer.wte.weight")
