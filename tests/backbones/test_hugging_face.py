"""Our models as models of transformers: calls, files, Auto classes, Trainer and adapters."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer, TrainingArguments

import mdiff
from mdiff.backbones.bit_transformer import bit_transformer
from mdiff.backbones.layers.hugging_face import (
    BitTransformerForMaskedLM,
    PretrainedTransformerConfig,
    TransformerForMaskedLM,
    as_pretrained,
)
from mdiff.backbones.transformer import transformer
from mdiff.denoiser import Denoiser, has_own_head
from mdiff.errors import ConfigError
from mdiff.find import find
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace

SMALL = {"width": 32, "depth": 2, "heads": 2}
BITS = {"bits": 6, "groups": 2, "grid": [2, 3]}
SHAPES = [
    {},
    {"tie": True},
    {"tie": True, "mask_id": 3},
    {"layout": [[2, 3, 1], [1, 6, 1]]},
    {"uses_time": True, "classes": 4, "causal": True},
    BITS,
    BITS | {"embedding": "table", "mask_vector": True, "classes": 2},
]
both = pytest.mark.parametrize("options", [{}, BITS], ids=["tokens", "bits"])


def plain(**options):
    """A plain model whose weights, the zero ones too, are large enough to matter."""
    torch.manual_seed(0)
    if "bits" in options:
        model = bit_transformer(**SMALL, **options)
    else:
        model = transformer(**{"vocab_size": 11, **SMALL, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def canvas_of(model, rows=2, length=12):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.vocab_size, (rows, length), generator=generator)
    tokens[:, ::3] = model.mask_id
    return tokens


def conditions(options):
    """The time and the label that a model of these options takes."""
    return {
        **({"t": torch.tensor([0.2, 0.9])} if options.get("uses_time") else {}),
        **({"cond": {"label": torch.arange(2)}} if options.get("classes") else {}),
    }


@pytest.mark.parametrize("options", SHAPES)
def test_it_is_the_plain_model_with_the_same_parameters(options):
    model = plain(**options)
    wrapped = as_pretrained(model)
    ours, theirs = dict(model.named_parameters()), dict(wrapped.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is parameter for name, parameter in ours.items())
    tokens = canvas_of(model)
    at = tokens == model.mask_id
    expected = model(tokens, at=at, **conditions(options))
    assert torch.equal(wrapped(tokens, at=at, **conditions(options)), expected)
    assert isinstance(wrapped, Denoiser)
    assert has_own_head(wrapped)


@pytest.mark.parametrize("options", SHAPES)
def test_a_fresh_one_has_the_weights_of_a_fresh_plain_model(options):
    kind = BitTransformerForMaskedLM if "bits" in options else TransformerForMaskedLM
    torch.manual_seed(5)
    ours = (bit_transformer if "bits" in options else transformer)(**SMALL, **options)
    torch.manual_seed(5)
    theirs = kind(kind.config_class(**SMALL, **options))
    for (name, one), (other_name, other) in zip(
        ours.state_dict().items(), theirs.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, other), name


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("saved_by", ["plain", "transformers"])
def test_a_saved_model_gives_the_same_bits_by_either_reader(options, saved_by, tmp_path):
    model = plain(**options)
    (model if saved_by == "plain" else as_pretrained(model)).save_pretrained(tmp_path)
    tokens, more = canvas_of(model), conditions(options)
    expected = model(tokens, **more)
    theirs, report = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs) is type(as_pretrained(model))
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    assert not theirs.training
    assert torch.equal(theirs(tokens, **more), expected)
    ours = mdiff.load(tmp_path, mask_id=model.mask_id, device="cpu").denoiser
    assert type(ours) is type(model)
    assert torch.equal(ours(tokens, **more), expected)
    assert ours.config == theirs.config.to_plain() == model.config


@pytest.mark.parametrize("options", [{"tie": True}, BITS])
def test_both_write_the_same_config(options, tmp_path):
    model = plain(**options)
    model.save_pretrained(tmp_path / "ours")
    as_pretrained(model).save_pretrained(tmp_path / "theirs")
    ours, theirs = ((tmp_path / n / "config.json").read_text() for n in ("ours", "theirs"))
    assert ours == theirs


def test_what_a_file_lacks_is_initialised_and_what_it_holds_is_not(tmp_path):
    from safetensors.torch import load_file, save_file

    model = plain(**BITS, embedding="table")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: x for n, x in tensors.items() if n not in ("head.weight", "norm.weight")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = BitTransformerForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in kept.items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(found.norm.weight, torch.ones(32))
    assert float(found.head.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


@both
def test_it_answers_as_transformers_does(options):
    model = as_pretrained(plain(**options))
    tokens = canvas_of(model)
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    labels = torch.full_like(tokens, -100)
    labels[:, 3:6] = 2
    output = model(input_ids=tokens, attention_mask=mask, labels=labels)
    logits = model(tokens, valid=mask.bool())
    assert torch.equal(output.logits, logits)
    expected = -logits.log_softmax(-1)[:, 3:6, 2].mean()
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(model(input_ids=tokens, return_dict=False)[0], model(tokens))
    with pytest.raises(ConfigError, match="without tokens"):
        model()


@pytest.mark.filterwarnings("ignore")
@both
def test_an_adapter_trains_and_merges(options):
    from peft import LoraConfig, get_peft_model

    base = as_pretrained(plain(**options))
    tokens = canvas_of(base)
    before = base(tokens)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["qkv", "into", "out"]))
    assert isinstance(adapted, Denoiser)
    assert adapted.uses_time is False
    at = tokens == base.config.mask_id
    torch.testing.assert_close(adapted(tokens, at=at), before[at], atol=1e-5, rtol=0)
    optimiser = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        adapted(tokens, at=at).square().mean().backward()
        optimiser.step()
    after = adapted(tokens, at=at)
    assert not torch.allclose(after, before[at], atol=1e-3)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(tokens, at=at), after, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_trains_it(tmp_path):
    model = plain()
    tokens = canvas_of(model, rows=8)
    rows = [{"input_ids": row, "labels": row.clamp(max=10)} for row in tokens]
    settings = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        learning_rate=0.01,
    )  # fmt: skip
    before = model.head.weight.detach().clone()
    Trainer(as_pretrained(model), settings, train_dataset=rows).train()
    assert not torch.equal(model.head.weight, before)


def test_the_config_survives_json(tmp_path):
    config = PretrainedTransformerConfig(
        vocab_size=9, hidden_size=32, heads=2, grid=(3, 5), mask_id=2
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.grid, loaded.mask_id, loaded.mlp_width) == ([3, 5], 2, 96)
    assert loaded.hidden_size == 32
    assert json.loads((tmp_path / "config.json").read_text())["width"] == 32
    with pytest.raises(ConfigError, match="divisible"):
        PretrainedTransformerConfig(heads=3)


def test_a_pipeline_of_one_is_saved_as_that_of_the_plain_model(tmp_path):
    model = plain()
    space, modality = TokenSpace(11, mask_id=11), find("modalities", "ids")
    made = mdiff.Pipeline(
        as_pretrained(model), space, modality(vocab_size=11, mask_id=11), Linear(), window=12
    )
    made.save(tmp_path / "saved")
    loaded = mdiff.load(tmp_path / "saved", device="cpu").denoiser
    tokens = canvas_of(model)
    assert torch.equal(loaded(tokens), model(tokens))
