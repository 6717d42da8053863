"""Adapted causal models: the trunk against transformers with a full mask, how they are known."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from decoder_checkpoints import (
    assert_damage_is_refused,
    assert_rows_do_not_depend_on_padding,
    assert_saving_gives_the_files_back,
    copied,
    loaded,
)
from safetensors.torch import load_file

from mdiff.backbones.layers.attention import KeyValues
from mdiff.errors import CheckpointError, ConfigError
from mdiff.pipeline.loading import load

SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0,
}  # fmt: skip
KINDS = {
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10, "attention_bias": False}),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "llama": ("Llama", {"rms_norm_eps": 1e-5}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 6}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 12}),
    "qwen2-yarn": ("Qwen2", {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    ),
}


def written(folder, kind, **described):
    """A tiny checkpoint of transformers' own layout, all parameters random, and its model."""
    torch.manual_seed(3)
    family, options = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**(SIZES | options))
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    settings = {"architectures": [f"A2D{family}LMHeadModel"], "model_type": f"a2d-{family.lower()}"}
    path.write_text(json.dumps(saved | settings | {"mask_token_id": 39} | described))
    return theirs


def with_a_full_mask(theirs, tokens):
    """The logits of transformers' module where every position attends to every other."""
    with torch.no_grad():
        everything = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
        return theirs(tokens, attention_mask=everything, use_cache=False).logits


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def tokens():
    return torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_trunk_is_that_of_transformers_with_a_full_mask(tmp_path, tokens, kind):
    theirs = written(tmp_path / "model", kind)
    ours = loaded(tmp_path / "model")
    expected = with_a_full_mask(theirs, tokens)
    assert torch.allclose(ours(tokens), expected, atol=1e-5)
    causal = theirs(tokens, use_cache=False).logits
    assert not torch.allclose(expected, causal, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_saving_gives_the_files_back(tmp_path, kind):
    written(tmp_path / "model", kind)
    assert_saving_gives_the_files_back(tmp_path / "model", tmp_path / "saved")


def test_tied_files_keep_one_matrix_for_both_ends(tmp_path):
    written(tmp_path / "model", "qwen2-tied")
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    model = loaded(tmp_path / "model")
    assert model.lm_head.weight is model.model["embed_tokens"].weight


def test_damaged_files_are_refused(tmp_path):
    written(tmp_path / "model", "qwen3")
    assert_damage_is_refused(
        tmp_path / "model", tmp_path, name="model.layers.1.self_attn.q_norm.weight"
    )


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_padding(tmp_path, side, shifted):
    written(tmp_path / "model", "qwen3", shifted=shifted)
    assert_rows_do_not_depend_on_padding(
        loaded(tmp_path / "model"), length=11, ids=39, side=side
    )  # fmt: skip


def test_shifted_takes_each_row_from_the_position_before(tmp_path, tokens):
    written(tmp_path / "model", "qwen2")
    plain = loaded(tmp_path / "model")
    shifted = loaded(copied(tmp_path / "model", tmp_path / "other", described={"shifted": True}))
    assert not plain.shifted
    expected = plain(tokens)
    expected = torch.cat([expected[:, :1], expected[:, :-1]], 1)
    assert torch.allclose(shifted(tokens), expected, atol=1e-6)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Llama"])
def test_a_causal_model_is_taken_only_where_its_config_says_so(tmp_path, tokens, family):
    name = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    theirs = written(tmp_path / "model", family.lower(), **name)
    with pytest.raises(CheckpointError, match='"bidirectional": true') as caught:
        load(tmp_path / "model")
    assert caught.value.exit_code == 4
    settings = {"bidirectional": True, "shifted": False}
    pipeline = load(copied(tmp_path / "model", tmp_path / "settings", described=settings))
    assert pipeline.space.mask_id == 39
    expected = with_a_full_mask(theirs, tokens)
    assert torch.allclose(pipeline.denoiser(tokens), expected, atol=1e-5)


def test_a_model_without_a_mask_id_asks_for_one(tmp_path):
    written(tmp_path / "model", "qwen2", mask_token_id=None)
    with pytest.raises(ConfigError, match="mask_id="):
        load(tmp_path / "model")
    assert load(tmp_path / "model", mask_id=39).space.mask_id == 39


def test_diffullamas_own_names_are_shifted_and_saved_as_they_were(tmp_path, tokens):
    theirs = written(tmp_path / "model", "llama")
    tensors = load_file(tmp_path / "model/model.safetensors")
    renamed = {
        key.replace("model.embed_tokens", "embed_tokens").replace("model.", "denoise_model."): value
        for key, value in tensors.items()
    }
    settings = {"architectures": ["DiscreteDiffusionModel"], "model_type": "llama"}
    folder = copied(tmp_path / "model", tmp_path / "own", described=settings, tensors=renamed)
    ours = loaded(folder)
    assert ours.shifted
    expected = with_a_full_mask(theirs, tokens)
    expected = torch.cat([expected[:, :1], expected[:, :-1]], 1)
    assert torch.allclose(ours(tokens), expected, atol=1e-5)
    assert_saving_gives_the_files_back(folder, tmp_path / "saved")
    gpt2 = copied(folder, tmp_path / "gpt2", described={"model_type": "gpt2"})
    with pytest.raises(CheckpointError, match="model_type='gpt2'"):
        loaded(gpt2)


def test_a_block_length_makes_a_block_model_whose_cache_is_exact(tmp_path, tokens):
    written(tmp_path / "model", "qwen3")
    denoiser = load(tmp_path / "model", block_length=8).denoiser
    whole = denoiser(tokens)
    changed = tokens.clone()
    changed[:, 16:] = 39
    # What later blocks hold is not attended to.
    assert torch.allclose(denoiser(changed)[:, :16], whole[:, :16], atol=1e-5)
    cache = KeyValues()
    cache.growing = True
    steps = [denoiser(part, cache=cache) for part in tokens.split(8, 1)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("block_seed", [False, True])
def test_a_cache_holds_the_row_before_the_first_of_a_block(tmp_path, tokens, shifted, block_seed):
    written(tmp_path / "model", "qwen3", shifted=shifted)
    denoiser = load(tmp_path / "model", block_length=8).denoiser
    plain, denoiser.block_seed = denoiser(tokens), block_seed
    whole, cache = denoiser(tokens), KeyValues()
    first = torch.arange(24) % 8 == 0
    assert block_seed or torch.equal(whole, plain)
    assert torch.equal(whole[:, ~first], plain[:, ~first])
    if block_seed and not shifted:
        assert torch.equal(whole[:, 8::8], plain[:, 7:-1:8])
    for number, part in enumerate(tokens.split(8, 1)):
        rows = slice(8 * number, 8 * number + 8)
        assert torch.allclose(denoiser(part, cache=cache), whole[:, rows], atol=1e-5)
        assert torch.allclose(
            denoiser(part[1:], cache=cache.of_rows(torch.tensor([1]))), whole[1:, rows], atol=1e-5
        )
        cache.growing = True
        denoiser(part, cache=cache)
        cache.growing = False


@pytest.mark.parametrize(("entry", "said"), [
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ({"rope_parameters": YARN | {"beta_fast": "fast"}}, "beta_fast"),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type"),
    ({"rope_parameters": 3}, "rope_scaling=3"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"head_dim": None}, "head_dim"),
    ({"vocab_size": 10**12}, "vocab_size"),
    ({"mask_token_id": 40}, "mask_token_id"),
])  # fmt: skip
def test_configs_that_are_not_supported_are_refused_by_name(tmp_path, entry, said):
    written(tmp_path / "model", "qwen3", **entry)
    with pytest.raises(CheckpointError, match=said):
        loaded(tmp_path / "model")
