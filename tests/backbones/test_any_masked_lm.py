"""Every masked language model of transformers: its own logits, or a refusal that names it."""

from __future__ import annotations

import copy
import functools
import random
import re
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from folders import ROOT
from masked_lms import KINDS, MASK, PAD, VOCABULARY, tiny

import mdiff
from mdiff import MdiffError, Pipeline, TokenSpace, sample
from mdiff.backbones.masked_lm import masked_lm
from mdiff.errors import CheckpointError, ConfigError, DataError, MdiffWarning
from mdiff.modalities.ids import ids

# Families that look at the padding beside a row, or that take no mask of it.
OWN_LENGTHS = ["convbert", "mobilebert", "nystromformer", "yoso", "funnel", "fnet"]
SPACE = TokenSpace(VOCABULARY, mask_id=MASK)
# A row of the table of docs/checkpoints.md.
ROW = re.compile(r"^\| (`[^|]+`) \| (own logits|refused: )(.*) \|$", re.M)


@functools.cache
def family(kind):
    return tiny(kind)


def row(length, seed):
    """Tokens (1, length), some of them masks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCABULARY - 1, (1, length), generator=generator)
    tokens[:, 1::4] = MASK
    return tokens


def assert_its_own(model, own):
    """The logits are the model's own of each row alone, in any batch, packed, and by `at`."""
    rows = [row(9, 1), row(14, 2), row(9, 3), row(model.min_length, 4), row(17, 5)]
    with torch.no_grad():
        expected = [own(input_ids=one).logits[0] for one in rows]
        scale = max(float(each.abs().max()) for each in expected)
        tokens = torch.full((len(rows), 17), 7)
        valid = torch.zeros_like(tokens, dtype=torch.bool)
        for number, one in enumerate(rows):
            start = (17 - one.shape[1]) * (number % 2)
            tokens[number, start : start + one.shape[1]] = one
            valid[number, start : start + one.shape[1]] = True
        found = model(tokens, valid=valid)
        at = valid & (tokens % 3 == 1)
        assert torch.allclose(model(tokens, valid=valid, at=at), found[at], atol=1e-5 * scale)
        nowhere = torch.zeros_like(at)
        assert model(tokens, valid=valid, at=nowhere).shape == (0, found.shape[2])
        packed = model(
            torch.cat(rows, 1),
            documents=torch.arange(len(rows)).repeat_interleave(
                torch.tensor([one.shape[1] for one in rows])
            )[None],
        )[0]
        assert torch.allclose(packed, torch.cat(expected), atol=1e-5 * scale)
        for number, (one, alone) in enumerate(zip(rows, expected)):
            assert torch.equal(model(one)[0], alone)
            assert torch.allclose(found[number][valid[number]], alone, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", ["roberta", "esm", "ibert", "roformer", *OWN_LENGTHS])
def test_logits_are_the_models_own_in_any_batch(kind):
    model = masked_lm(family(kind), mask_id=MASK)
    assert model.pads == (kind not in OWN_LENGTHS)
    assert_its_own(model, family(kind))


def test_positions_that_begin_elsewhere_are_found(tmp_path):
    for kind in ("nystromformer", "yoso"):
        model = masked_lm(family(kind), mask_id=MASK)
        assert (model.first_position, model.max_length) == (2, 80)
    with pytest.raises(DataError, match="81 tokens: this model takes at most 80"):
        model(row(81, 1))
    with pytest.raises(DataError, match="1 tokens: this model takes at least"):
        masked_lm(family("funnel"), mask_id=MASK)(row(1, 1))
    model.save_pretrained(tmp_path / "yoso")
    loaded = mdiff.load(tmp_path / "yoso", device="cpu", mask_id=MASK)
    assert loaded.window == 80
    with torch.no_grad():
        assert torch.equal(loaded.denoiser(row(9, 1)), family("yoso")(input_ids=row(9, 1)).logits)


def test_a_model_whose_tokens_read_no_other_token_is_loaded_with_a_warning():
    with pytest.warns(MdiffWarning, match="MraForMaskedLM: no token's logits depend on another"):
        model = masked_lm(family("mra"), mask_id=MASK)
    assert_its_own(model, family("mra"))


def test_a_score_does_not_depend_on_the_rows_beside_it():
    model = masked_lm(family("convbert"), mask_id=MASK)
    pipeline = Pipeline(model, SPACE, ids(vocab_size=VOCABULARY, mask_id=MASK), window=40)
    alone = pipeline.score("5 6 7 8", draws=4).nats
    beside = pipeline.score(["5 6 7 8", " ".join(map(str, range(5, 40)))], draws=4).nats[:1]
    assert torch.allclose(alone, beside, rtol=1e-6)


def test_esm_fills_a_canvas_on_which_everything_is_hidden():
    own = tiny("esm", token_dropout=True)
    model = masked_lm(own, mask_id=MASK)
    assert_its_own(model, own)
    # Hidden tokens count as zeros; those given are none.
    limit = copy.deepcopy(own)
    limit.esm.embeddings.token_dropout = False
    with torch.no_grad():
        limit.esm.embeddings.word_embeddings.weight[MASK] = 0
        hidden = torch.full((2, 10), MASK)
        tokens, valid = hidden.clone(), torch.ones(2, 10, dtype=torch.bool)
        valid[1, 6:], tokens[1, 6:] = False, PAD
        # Its head is tied to the embeddings: their zeros are a column of its own.
        others = torch.arange(VOCABULARY) != MASK
        expected = limit(input_ids=hidden).logits[..., others]
        assert torch.allclose(model(hidden)[..., others], expected, atol=1e-5)
        expected = limit(input_ids=hidden[:1, :6]).logits[0][:, others]
        assert torch.allclose(model(tokens, valid=valid)[1, :6, others], expected, atol=1e-5)
    done = sample(model, hidden, space=SPACE)
    assert bool(done.log_prob.isfinite().all())


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("xmod", CheckpointError, "XmodForMaskedLM cannot be called with tokens alone"),
        ("reformer", CheckpointError, "ReformerForMaskedLM draws random numbers"),
        ("perceiver", CheckpointError, r"PerceiverForMaskedLM gives \(1, 80, 99\) for tokens"),
        ("bart", ConfigError, "BartForConditionalGeneration: expected an encoder"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(kind, error, reason):
    with pytest.raises(error, match=reason):
        masked_lm(family(kind), mask_id=MASK)


def test_a_model_of_several_languages_is_taken_once_one_is_set():
    own = tiny("xmod")
    own.set_default_language("en_XX")
    assert_its_own(masked_lm(own, mask_id=MASK), own)


def adapted():
    settings = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(family("bert")), settings)


def test_wrapped_models_are_looked_through():
    wrapped = adapted()
    assert_its_own(masked_lm(wrapped, mask_id=MASK), wrapped)
    parallel = masked_lm(torch.nn.DataParallel(family("bert")), mask_id=MASK)
    assert_its_own(parallel, family("bert"))


@pytest.mark.slow
def test_a_compiled_model_is_looked_through():
    compiled = torch.compile(family("bert"), backend="eager")
    assert_its_own(masked_lm(compiled, mask_id=MASK), family("bert"))


def test_wrapping_a_model_changes_neither_it_nor_the_process():
    own = tiny("bert").train()
    own.bert.encoder.eval()
    modes = [module.training for module in own.modules()]
    tokens = row(12, 1)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = own(input_ids=tokens).logits
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        model = masked_lm(masked_lm(own, mask_id=MASK).model, mask_id=MASK)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
        torch.manual_seed(1)
        assert torch.equal(own(input_ids=tokens).logits, expected)
    assert [module.training for module in own.modules()] == modes
    own.eval()
    at = tokens == MASK
    assert torch.allclose(model(tokens, at=at), model(tokens)[at], atol=1e-5)


def test_big_bird_does_not_change_at_its_first_short_row():
    own = tiny("big_bird", max_position_embeddings=200, block_size=4)
    model = masked_lm(own, mask_id=MASK)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    with torch.no_grad():
        long = model(row(150, 1))
        model(row(9, 2))
        assert torch.equal(model(row(150, 1)), long)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def outcome(kind):
    """What the table of docs/checkpoints.md says of a model_type, as it turns out."""
    own = tiny(kind)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", MdiffWarning)
            model = masked_lm(own, mask_id=MASK)
    except MdiffError as error:
        return f"refused: {str(error).removeprefix(type(own).__name__).strip(': ')}"
    assert_its_own(model, own)
    with torch.no_grad():
        assert bool(model(torch.full((1, 9), MASK)).isfinite().all())
        if model.max_length is not None:
            with pytest.raises(DataError, match="at most"):
                model(row(model.max_length + 1, 1))
        model(row(model.max_length or 100, 1))
    found = "own logits" if model.pads else "own logits, rows of one length a call"
    said = any(issubclass(one.category, MdiffWarning) for one in warned)
    return found + (", with a warning: no token reads another" if said else "")


@pytest.mark.slow
def test_the_table_of_the_page_on_checkpoints_is_the_outcome():
    transformers.logging.set_verbosity_error()
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = {
        name.strip("`"): said + more
        for listed, said, more in ROW.findall(text)
        for name in listed.split(", ")
    }
    assert table == {kind: outcome(kind) for kind in KINDS}
