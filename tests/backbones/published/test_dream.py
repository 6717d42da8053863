"""Dream against the official code: logits with their shift, its three algorithms, files."""

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

from mdiff.backbones.layers.attention import position_before
from mdiff.backbones.layers.backbone import Call
from mdiff.backbones.published.dream import dream_counts
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import read_model_files
from mdiff.modalities.text.tokenizers import byte_alphabet
from mdiff.pipeline.loading import load
from mdiff.pipeline.published import recognised
from mdiff.samplers.confidence import confidence
from mdiff.tokens import TokenSpace

FOLDER = GOLDEN / "dream"
SPACE = TokenSpace(128, mask_id=126)
ATOL = 1e-4
SCORES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


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
    assert recognised(read_model_files(FOLDER)) == "dream"


def test_logits_are_the_official_ones_shifted_by_a_position(model, golden):
    tokens = golden["input_ids"]
    assert torch.allclose(model(tokens), golden["logits_shifted"], atol=ATOL)
    raw = model.head(model.hidden(tokens, Call()))
    assert torch.allclose(raw, golden["logits_raw"], atol=ATOL)
    at = torch.zeros_like(tokens, dtype=torch.bool)
    at[:, ::3] = True
    assert torch.allclose(model(tokens, at=at), golden["logits_shifted"][at], atol=ATOL)


def test_padding_in_front_is_as_in_the_official_code(model, golden):
    valid = golden["padded.attention_mask"].bool()
    raw = model.head(model.hidden(golden["padded.input_ids"], Call(valid=valid)))
    assert torch.allclose(raw[valid], golden["padded.logits_raw"][valid], atol=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_do_not_depend_on_padding_nor_does_the_shift(model, side):
    assert_rows_do_not_depend_on_padding(model, length=11, ids=126, side=side)


def test_the_position_before_is_the_last_valid_one_of_the_same_document():
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    valid = torch.tensor([[False, True, False, True, True, True]] * 2)
    documents = torch.tensor([[7, 7, 7, 7, 9, 9], [1, 2, 1, 1, 2, 1]])
    assert position_before(tokens, valid=None, documents=None)[0].tolist() == [0, 0, 1, 2, 3, 4]
    alone = position_before(tokens, valid=valid, documents=None)
    assert alone[0, valid[0]].tolist() == [1, 1, 3, 4]
    packed = position_before(tokens, valid=valid, documents=documents)
    assert packed[0, valid[0]].tolist() == [1, 1, 4, 4]
    assert packed[1, valid[1]].tolist() == [1, 3, 1, 3]


@pytest.mark.parametrize(("name", "steps", "filters"), [
    ("gen.maskgit_plus", 5, {}),
    ("gen.topk_margin", 5, {}),
    ("gen.entropy", 12, {}),
    ("gen.entropy_top_p", 6, {"top_p": 0.9}),
    ("gen.maskgit_plus_top_k", 6, {"top_k": 5}),
    ("gen_padded.maskgit_plus", 7, {}),
    ("gen_padded.entropy", 4, {}),
])  # fmt: skip
def test_diffusion_generate_gives_the_official_tokens_step_by_step(
    model, golden, name, steps, filters
):
    group, _, rest = name.partition(".")
    algorithm = next(each for each in SCORES if rest.startswith(each))
    prompt = golden[f"{group}.prompt"]
    canvas = torch.nn.functional.pad(prompt, (0, 12), value=SPACE.mask_id)
    valid = None
    if group == "gen_padded":
        attended = golden["gen_padded.attention_mask"].bool()
        valid = torch.nn.functional.pad(attended, (0, 12), value=True)
    counts = dream_counts(torch.full((len(prompt),), 12), steps=steps)
    states = confidence(
        model, canvas, space=SPACE, valid=valid, temperature=0.0, score=SCORES[algorithm],
        measure="drawn", counts=counts, **filters,
    )  # fmt: skip
    # A step of the official code that writes nothing stands in its history all the same.
    found = []
    for count in counts[0].tolist():
        found.append(next(states).tokens if count else (found[-1] if found else canvas))
    assert torch.equal(torch.stack(found), golden[f"{name}.history"])
    assert torch.equal(found[-1], golden[f"{name}.output"])


def test_counts_are_the_official_ones():
    cases = json.loads((FOLDER / "tokens_per_step.json").read_text())["cases"]
    assert len(cases) == 6
    for case in cases:
        hidden = torch.tensor([case["new_tokens"], 1])
        table = dream_counts(hidden, steps=case["steps"], epsilon=case["eps"])
        assert table[0].tolist() == case["moved_per_step"]
        assert table.sum(1).tolist() == hidden.tolist()
    with pytest.raises(ConfigError, match="steps=0"):
        dream_counts(hidden, steps=0)


def test_saving_gives_the_files_back(tmp_path):
    assert_saving_gives_the_files_back(FOLDER, tmp_path / "saved")


def test_damaged_files_are_refused(tmp_path):
    assert_damage_is_refused(FOLDER, tmp_path, name="model.layers.0.self_attn.k_proj.bias")


@pytest.mark.parametrize(("entry", "said"), [
    ({"hidden_size": -4}, "hidden_size"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_key_value_heads": None}, "num_key_value_heads"),
    ({"num_attention_heads": 5}, "num_key_value_heads"),
    ({"hidden_size": 36}, "head of 9"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
])  # fmt: skip
def test_configs_that_are_not_supported_are_refused_by_name(tmp_path, entry, said):
    with pytest.raises(CheckpointError, match=said):
        loaded(copied(FOLDER, tmp_path / "other", described=entry))


def test_a_pipeline_knows_the_mask_and_generates():
    pipeline = load(FOLDER)
    assert pipeline.space == SPACE
    assert pipeline.window == 128
    (sample,) = pipeline.generate(
        length=6, sampler="confidence", score="entropy", temperature=0.0, measure="drawn"
    )
    assert SPACE.mask_id not in sample.tokens


def test_its_tokenizer_is_read_without_the_code_beside_it(tmp_path):
    """The files name a class that comes as code; they are those of Qwen2's."""
    folder = copied(FOLDER, tmp_path / "model")
    letters = byte_alphabet()[:123]
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"ab": 123}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {"124": "<|endoftext|>", "125": "<|im_end|>", "126": "<|mask|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "DreamTokenizer",
                "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
                "eos_token": "<|endoftext|>",
                "mask_token": "<|mask|>",
                "added_tokens_decoder": {
                    number: {"content": content, "special": True}
                    for number, content in special.items()
                },
            }
        )
    )
    pipeline = load(folder)
    assert pipeline.space == SPACE
    assert pipeline.modality.eos_id == 124
    assert pipeline.modality.encode("abc") == [123, vocabulary["c"]]
