"""Masked language models of transformers as denoisers, on tiny random ones."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import Tensor, nn

from mdiff.backbones.masked_lm import masked_lm
from mdiff.denoiser import Denoiser
from mdiff.errors import CheckpointError, ConfigError, DataError

VOCABULARY, MASK, PAD = 40, 4, 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
# ModernBERT's local layers look two positions to either side, so that distances matter.
FAMILIES = {
    "Bert": {},
    "Roberta": {},
    "ModernBert": {
        "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 0,
        "sep_token_id": 2,
    },
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "Electra": {"embedding_size": 16},
    "Albert": {"embedding_size": 16},
}  # fmt: skip


@functools.cache
def family(name: str) -> transformers.PreTrainedModel:
    """A tiny model of that family with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name])
    model = getattr(transformers, f"{name}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
    return model


def row(length: int, seed: int) -> Tensor:
    """Tokens (1, length), some of them masks and some the padding's id, given as a token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (1, length), generator=generator)
    tokens[:, ::3] = MASK
    tokens[:, 4] = PAD
    return tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_equals_one_by_one(name):
    model = masked_lm(family(name), mask_id=MASK)
    assert isinstance(model, Denoiser)
    alone = [row(9, 1), row(9, 2), row(12, 3), row(6, 4)]
    where = [range(9), range(5, 14), range(1, 13), [0, 1, 4, 5, 9, 10]]
    tokens = torch.full((4, 14), 7)
    valid = torch.zeros(4, 14, dtype=torch.bool)
    for index, (single, positions) in enumerate(zip(alone, where, strict=True)):
        tokens[index, list(positions)] = single[0]
        valid[index, list(positions)] = True
    with torch.no_grad():
        logits = model(tokens, valid=valid)
        assert logits.shape == (4, 14, VOCABULARY)
        for index, single in enumerate(alone):
            torch.testing.assert_close(
                logits[index][valid[index]], model(single)[0], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_the_models_own(name):
    tokens = row(10, 5)
    tokens[:, 4] = 9
    with torch.no_grad():
        ours = masked_lm(family(name), mask_id=MASK)(tokens)
        theirs = family(name)(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert float(theirs.std()) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ragged", [False, True])
def test_at_equals_indexing_and_the_head_reads_only_those_rows(name, ragged):
    hugging_face = family(name)
    model = masked_lm(hugging_face, mask_id=MASK)
    tokens = torch.cat([row(11, 6), row(11, 7)])
    valid = None
    if ragged:
        valid = torch.ones_like(tokens, dtype=torch.bool)
        valid[0, :3] = False
    at = (tokens == MASK) & (True if valid is None else valid)
    read = []
    output = hugging_face.get_output_embeddings()
    handle = output.register_forward_hook(lambda _, given, __: read.append(given[0].shape[:-1]))
    with torch.no_grad():
        chosen = model(tokens, at=at, valid=valid)
        handle.remove()
        whole = model(tokens, valid=valid)
    assert read == [(1, int(at.sum()))]
    torch.testing.assert_close(chosen, whole[at], atol=1e-5, rtol=0)
    assert hugging_face(input_ids=tokens).logits.shape == (2, 11, VOCABULARY)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_document_gets_the_logits_that_it_gets_alone(name):
    model = masked_lm(family(name), mask_id=MASK)
    parts = [row(5, 1), row(7, 2), row(6, 3)]
    packed = torch.cat([torch.cat(parts, 1), torch.cat(parts[::-1], 1)])
    documents = torch.tensor([[3] * 5 + [1] * 7 + [2] * 6, [2] * 6 + [1] * 7 + [3] * 5])
    with torch.no_grad():
        logits = model(packed, documents=documents)
        at = packed == MASK
        torch.testing.assert_close(
            model(packed, documents=documents, at=at), logits[at], atol=1e-5, rtol=0
        )
        for order, line in ((parts, logits[0]), (parts[::-1], logits[1])):
            pieces = line.split([part.shape[1] for part in order])
            for part, piece in zip(order, pieces, strict=True):
                torch.testing.assert_close(piece, model(part)[0], atol=1e-5, rtol=0)


def test_roberta_counts_from_behind_its_padding_id():
    model = masked_lm(family("Roberta"), mask_id=MASK)
    assert (model.first_position, model.max_length) == (PAD + 1, 24 - PAD - 1)
    assert masked_lm(family("Bert"), mask_id=MASK).max_length == 24


def test_gradients_reach_the_trunk_through_chosen_rows():
    hugging_face = family("Bert")
    tokens = row(8, 1)
    masked_lm(hugging_face, mask_id=MASK)(tokens, at=tokens == MASK).square().sum().backward()
    assert bool(hugging_face.bert.embeddings.word_embeddings.weight.grad.any())
    hugging_face.zero_grad()


def test_a_directory_loads_with_its_tokenizers_mask(tmp_path):
    from tokenizers import Tokenizer, models

    words = {"[PAD]": 0, "[UNK]": 1, "a": 2, "[MASK]": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]",
    )  # fmt: skip
    masked_lm(family("Bert"), mask_id=MASK).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = masked_lm(tmp_path)
    assert (loaded.mask_id, loaded.vocab_size) == (3, VOCABULARY)
    tokens = row(8, 1)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), masked_lm(family("Bert"), mask_id=MASK)(tokens))
    half = masked_lm(tmp_path, mask_id=MASK, dtype="bfloat16")
    assert (half.mask_id, half.model.dtype) == (MASK, torch.bfloat16)


def test_what_is_no_masked_language_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give mask_id="):
        masked_lm(family("Bert"))
    with pytest.raises(ConfigError, match=r"mask_id=40: .* from 0 to 39"):
        masked_lm(family("Bert"), mask_id=40)
    with pytest.raises(ConfigError, match="expected an encoder with a head"):
        masked_lm(family("Bert").bert, mask_id=MASK)
    model = masked_lm(family("Roberta"), mask_id=MASK)
    with pytest.raises(DataError, match="23 tokens: this model takes at most 22"):
        model(row(23, 1))
    with pytest.raises(ConfigError, match="neither conditions nor a cache"):
        model(row(8, 1), cond={"label": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"."):
        masked_lm(tmp_path, mask_id=MASK)
    family("Bert").bert.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="missing keys"):
        masked_lm(tmp_path, mask_id=MASK)


def test_pickled_weights_are_not_read(tmp_path):
    family("Bert").config.save_pretrained(tmp_path)
    torch.save(family("Bert").state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        masked_lm(tmp_path, mask_id=MASK)


def test_weights_given_by_this_modules_names_are_saved_by_transformers_own(tmp_path):
    """Training hands over averaged weights under the names of the wrapping module."""
    model = masked_lm(family("Bert"), mask_id=MASK)
    averaged = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=averaged)
    again = masked_lm(tmp_path, mask_id=MASK).state_dict()
    name = next(n for n in again if n.endswith("word_embeddings.weight"))
    assert torch.equal(again[name], averaged[name])
