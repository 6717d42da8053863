"""MDLM, BD3LM, SMDM and GIDD against outputs of their official code, in tests/golden."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from folders import GOLDEN as GOLDEN
from safetensors.torch import load_file, save_file

import mdiff
from mdiff.backbones.layers.attention import KeyValues
from mdiff.backbones.layers.backbone import Layout
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import read_model_files
from mdiff.files.untrusted import read_json
from mdiff.objective.bound import nll_bound
from mdiff.objective.nll import token_nll
from mdiff.pipeline.published import built, load_published, recognised
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace

FAMILIES = ["mdlm", "bd3lm", "smdm", "gidd"]
# The README of the fixtures gives 1e-4; a loose norm or a wrong gate is far beyond this.
CLOSE = {"rtol": 0, "atol": 1e-5}


def model(name):
    folder = GOLDEN / name
    files = read_model_files(folder)
    return load_published(files, recognised(files)).eval()


def golden(name):
    return load_file(GOLDEN / name / "golden.safetensors")


def called(denoiser, tokens, **more):
    t = torch.full(tokens.shape[:1], 0.4) if denoiser.uses_time else None
    with torch.no_grad():
        return denoiser(tokens, t=t, **more)


def altered(name, tmp_path, **changes):
    """A copy of a model with entries of its config changed; None removes one."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    described = read_json(folder / "config.json") | changes
    kept = {key: value for key, value in described.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


# logits


def test_mdlm_gives_the_official_logits_and_log_probabilities():
    expected, denoiser = golden("mdlm"), model("mdlm")
    logits = called(denoiser, expected["xt"])
    assert torch.allclose(logits, expected["logits"], **CLOSE)
    # SUBS: no mass on the mask, and what is not hidden is carried over.
    logits[..., denoiser.mask_id] = -math.inf
    log_p = logits.log_softmax(-1)
    hidden = expected["xt"] == denoiser.mask_id
    ours, theirs = log_p[hidden][:, :-1], expected["subs_log_probs"][hidden][:, :-1]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)
    nll = token_nll(logits, expected["x0"], expected["xt"], space=TokenSpace(50, mask_id=49))
    assert torch.allclose(-nll, expected["subs_log_prob_x0"] * hidden, rtol=0, atol=1e-4)
    nelbo = nll / expected["t"][:, None]
    assert torch.allclose(nelbo, expected["nelbo_per_token"], rtol=1e-4, atol=1e-5)


def test_a_time_conditioned_mdlm_is_given_the_total_noise_of_its_schedule(tmp_path):
    expected = golden("mdlm")
    denoiser = load_published(
        read_model_files(altered("mdlm", tmp_path, time_conditioning=True)), "mdlm"
    )
    assert denoiser.uses_time
    assert torch.allclose(denoiser.level(expected["t"]), expected["sigma"], rtol=1e-6)
    with torch.no_grad():
        logits = denoiser(expected["xt"], t=expected["t"])
    assert torch.allclose(logits, expected["logits_time_conditioned"], **CLOSE)
    with pytest.raises(ConfigError, match="call it with t="):
        denoiser(expected["xt"])


def test_a_time_conditioned_bd3lm_is_given_no_more_than_its_most_noise(tmp_path):
    denoiser = load_published(
        read_model_files(altered("bd3lm", tmp_path, time_conditioning=True)), "bd3lm"
    )
    level = denoiser.level(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert level.tolist() == pytest.approx([0, math.log(2), math.log(1000)])


def test_bd3lm_gives_the_official_logits_of_sampling_and_of_training():
    expected, denoiser = golden("bd3lm"), model("bd3lm")
    assert denoiser.block_length == 4
    logits = called(denoiser, expected["sample.input_ids"])
    assert torch.allclose(logits, expected["sample.logits"], **CLOSE)
    block = torch.arange(32) % 16 // 4
    clean = torch.arange(32) >= 16
    before, same = block[:, None] > block, block[:, None] == block
    mask = same & (clean[:, None] == clean) | before & clean
    assert torch.equal(mask, expected["train.block_mask"].bool())
    both = torch.cat([expected["xt"], expected["x0"]], 1)
    with torch.no_grad():
        layout = Layout(torch.arange(16).repeat(2)[None], mask[None, None])
        read = denoiser.stream(both, layout)
        logits = denoiser.head(read)[:, :16]
    assert torch.allclose(logits, expected["train.logits"], **CLOSE)
    nll = token_nll(logits, expected["x0"], expected["xt"], space=TokenSpace(40, mask_id=39))
    nelbo = nll / expected["t_per_block"].repeat_interleave(4, 1)
    assert torch.allclose(nelbo, expected["train.nelbo_per_token"], rtol=1e-4, atol=1e-5)


def test_bd3lms_training_logits_are_those_of_each_block_behind_the_clean_ones():
    expected, denoiser = golden("bd3lm"), model("bd3lm")
    for first in range(0, 16, 4):
        canvas = torch.cat([expected["x0"][:, :first], expected["xt"][:, first:]], 1)
        block = called(denoiser, canvas)[:, first : first + 4]
        assert torch.allclose(block, expected["train.logits"][:, first : first + 4], **CLOSE)


def test_a_cached_bd3lm_gives_the_official_cached_logits_block_by_block():
    expected, denoiser = golden("bd3lm"), model("bd3lm")
    cache = KeyValues()
    cache.growing = True
    for first in range(0, 12, 4):
        tokens = expected["sample.input_ids"][:, first : first + 4]
        logits = called(denoiser, tokens, cache=cache)
        theirs = expected["sample.logits_cached"][:, first : first + 4]
        assert torch.allclose(logits, theirs, **CLOSE)


def test_smdm_gives_the_official_logits_with_tables_in_bfloat16():
    expected, denoiser = golden("smdm"), model("smdm")
    assert (denoiser.vocab_size, denoiser.mask_id) == (64, 64)
    logits = called(denoiser, expected["input_ids"])
    assert torch.allclose(logits, expected["logits"], **CLOSE)
    logits = called(denoiser, expected["input_ids"][:, :12])
    assert torch.allclose(logits, expected["logits_first_12"], **CLOSE)


def test_gidd_gives_the_official_logits_and_bound():
    expected, denoiser = golden("gidd"), model("gidd")
    with torch.no_grad():
        logits = denoiser(expected["z_t"], t=expected["t"])
        assert torch.allclose(logits, expected["logits"], **CLOSE)
        hidden = expected["z_t_masked_only"]
        logits = denoiser(hidden, t=expected["t"])
    nll = token_nll(logits, expected["x"], hidden, space=TokenSpace(40, mask_id=39))
    bound = nll / expected["t"][:, None]
    masked = hidden == 39
    assert torch.allclose(
        bound[masked], expected["pu0.elbo_per_token"][masked], rtol=2e-4, atol=1e-5
    )
    assert torch.allclose(bound, expected["mdlm_elbo_per_token"], rtol=1e-3, atol=1e-5)


# loading, running, saving


@pytest.mark.parametrize("name", FAMILIES)
def test_save_after_load_is_bit_equal_with_the_same_config(name, tmp_path):
    model(name).save_pretrained(tmp_path)
    before = load_file(GOLDEN / name / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key
    assert read_json(tmp_path / "config.json") == read_json(GOLDEN / name / "config.json")


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_on_either_side_and_packing_leave_logits_alone(name):
    denoiser = model(name)
    tokens = torch.arange(10).remainder(7)[None]
    alone = called(denoiser, tokens)
    for left in (0, 1, 5):
        padded = torch.full((2, 16), 9)
        padded[0, left : left + 10] = tokens
        valid = torch.zeros(2, 16, dtype=torch.bool)
        valid[0, left : left + 10] = True
        valid[1] = True
        beside = called(denoiser, padded, valid=valid)
        assert torch.allclose(beside[0, left : left + 10], alone[0], **CLOSE)
    packed = torch.cat([tokens[:, :6], tokens], 1)
    documents = torch.tensor([[0] * 6 + [1] * 10])
    beside = called(denoiser, packed, documents=documents)
    assert torch.allclose(beside[:, 6:], alone, **CLOSE)
    at = torch.zeros(1, 10, dtype=torch.bool)
    at[0, [2, 7]] = True
    assert torch.allclose(called(denoiser, tokens, at=at), alone[at], **CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_a_tensor_at_fault_is_refused_by_name(name, fault, tmp_path):
    folder = altered(name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    key = sorted(tensors)[3]
    if fault == "missing":
        del tensors[key]
    elif fault == "unexpected":
        key = "another.weight"
        tensors[key] = torch.zeros(2)
    else:
        tensors[key] = torch.zeros(3, 5, 7)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{fault}: {key}"):
        load_published(read_model_files(folder), name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mdlm", {"hidden_dim": 2**40}), ("mdlm", {"n_blocks": 10**6}), ("mdlm", {"n_heads": 5}),
        ("mdlm", {"vocab_size": "50"}), ("bd3lm", {"causal": True}), ("bd3lm", {"adaln": False}),
        ("bd3lm", {"cross_attn": False}), ("bd3lm", {"block_size": 3}), ("smdm", {"bias": True}),
        ("smdm", {"rotary_percentage": None}), ("smdm", {"n_query_groups": 3}),
        ("smdm", {"_mlp_class": "GptNeoxMLP"}), ("gidd", {"max_seq_len": 2**40}),
        ("gidd", {"p_uniform": 2.0}),
    ],
)  # fmt: skip
def test_a_config_that_is_absurd_or_not_supported_is_refused_by_the_entry(name, change, tmp_path):
    folder = altered(name, tmp_path, **change)
    (entry,) = change
    with pytest.raises(CheckpointError, match=entry if entry != "n_heads" else "5 heads"):
        load_published(read_model_files(folder), name)


def test_what_a_config_leaves_out_is_the_class_default(tmp_path):
    """MDLM's class default of cond_dim is 129, not the 128 of its published model."""
    described = read_json(altered("mdlm", tmp_path, cond_dim=None) / "config.json")
    shape = built("mdlm", described).state_dict()["backbone.sigma_map.mlp.0.bias"].shape
    assert shape == (129,)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("mdlm", "backbone.rotary_emb.inv_freq"), ("bd3lm", "sampling_eps_max"),
        ("gidd", "rotary_emb.cos_cached"), ("smdm", None),
    ],
)  # fmt: skip
def test_a_lighter_type_casts_weights_and_keeps_the_tables(name, table):
    lighter = load_published(read_model_files(GOLDEN / name), name, dtype=torch.bfloat16).eval()
    assert {each.dtype for each in lighter.parameters()} == {torch.bfloat16}
    assert table is None or lighter.state_dict()[table].dtype == torch.float32
    tokens = torch.arange(12)[None]
    logits, exact = called(lighter, tokens), called(model(name), tokens)
    assert logits.dtype == torch.bfloat16
    # A dozen roundings to 8 bits of a stream of a few layers.
    assert (logits.float() - exact).abs().mean() < 0.05 * exact.std()


# pipelines


@pytest.mark.parametrize("p_uniform", [0.0, 0.1])
def test_gidd_generates_and_is_scored_under_its_own_noise(tmp_path, p_uniform):
    pipeline = mdiff.load(altered("gidd", tmp_path, p_uniform=p_uniform), device="cpu")
    for options in ({"sampler": "ancestral"}, {"sampler": "psi", "kappa": 0.5}):
        (made,) = pipeline.generate(length=8, steps=8, seed=1, **options)
        assert 39 not in made.tokens
    (made,) = pipeline.generate(length=8, seed=1)
    assert 39 not in made.tokens
    bound = pipeline.score([[1, 2, 3, 4, 5]], draws=16)
    assert bound.nats.isfinite().all()
    pipeline.save(tmp_path / "saved")
    again = mdiff.load(tmp_path / "saved", device="cpu")
    assert (again.process, again.schedule) == (pipeline.process, pipeline.schedule)
    assert again.generate(length=8, seed=1)[0].tokens == made.tokens


def test_a_sampler_of_masks_is_refused_under_noise_that_writes_random_tokens():
    pipeline = mdiff.load(GOLDEN / "gidd", device="cpu")
    with pytest.raises(ConfigError, match=r"'process', the noise .*; ancestral, psi do"):
        pipeline.generate(length=8, sampler="first_hitting")


@pytest.mark.parametrize("name", ["mdlm", "bd3lm", "smdm"])
def test_a_saved_pipeline_is_loaded_again(name, tmp_path):
    pipeline = mdiff.load(GOLDEN / name, device="cpu")
    pipeline.save(tmp_path / "saved")
    again = mdiff.load(tmp_path / "saved", device="cpu")
    assert (again.space, again.window) == (pipeline.space, pipeline.window)
    assert type(again.denoiser) is type(pipeline.denoiser)
    tokens = torch.arange(8)[None]
    assert torch.equal(called(again.denoiser, tokens), called(pipeline.denoiser, tokens))


@pytest.mark.parametrize("name", ["mdlm", "smdm"])
def test_the_bound_of_a_loaded_model_is_its_exact_average_over_orders(name):
    pipeline = mdiff.load(GOLDEN / name, device="cpu")
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    settings = {"space": pipeline.space, "schedule": Linear(), "seed": 0}
    exact = nll_bound(pipeline.denoiser, tokens, estimator="exact", **settings).nats
    drawn = nll_bound(pipeline.denoiser, tokens, draws=200, **settings)
    # Five standard errors of two rows: a false alarm in a million.
    assert ((drawn.nats - exact).abs() < 5 * drawn.stderr).all()


@pytest.mark.parametrize("name", ["mdlm", "bd3lm", "smdm"])
def test_a_greedy_batch_of_ragged_canvases_is_each_run_alone(name):
    pipeline = mdiff.load(GOLDEN / name, device="cpu")
    mask = pipeline.space.mask_id
    templates = ["1 2 _ _ _ _ _ _", "5 _ _ _ _ _ _ _ _ _ _ _", "_ _ 7 8 _ 9 _"]
    options = {"sampler": "confidence", "steps": 4, "temperature": 0.0}
    together = pipeline.infill(templates, **options)
    for template, made in zip(templates, together, strict=True):
        (alone,) = pipeline.infill(template, **options)
        assert made.tokens == alone.tokens
        assert mask not in made.tokens


def test_students_of_sdtt_and_duo_have_mdlms_trunk(tmp_path):
    """Under their own names; no official outputs of either are compared."""
    official, described = golden("mdlm"), read_json(GOLDEN / "mdlm/config.json")
    tokens = official["input_ids"] if "input_ids" in official else torch.arange(12)[None] % 7
    student = built_with(tmp_path / "sdtt", described | {"architectures": ["SDTT"]})
    assert torch.equal(student(tokens), model("mdlm")(tokens))
    timed = built_with(tmp_path / "timed", described | {"time_conditioning": True})
    duo = built_with(tmp_path / "duo", described | {"architectures": ["DUO"], "causal": False})
    t = torch.full((len(tokens),), 0.3)
    assert (duo.noise, duo.mask_id) == ("uniform", duo.vocab_size)
    assert torch.equal(duo(tokens, t=t), timed(tokens, t=t))
    pipeline = mdiff.load(tmp_path / "duo")
    (made,) = pipeline.generate(length=8, steps=6, sampler="psi", kappa=0.7, seed=1)
    assert max(made.tokens) < duo.vocab_size
    assert float(pipeline.score([[1, 2, 3, 4]], draws=16).nats) > 0
    with pytest.raises(ConfigError, match=r"'process', the noise .*; ancestral, psi do"):
        pipeline.generate(length=8, sampler="confidence")
    with pytest.raises(CheckpointError, match="causal"):
        built_with(tmp_path / "causal", described | {"architectures": ["DUO"], "causal": True})


def built_with(folder, described):
    """MDLM's golden weights under another config."""
    shutil.copytree(GOLDEN / "mdlm", folder)
    (folder / "config.json").write_text(json.dumps(described))
    files = read_model_files(folder)
    return load_published(files, recognised(files)).eval()
