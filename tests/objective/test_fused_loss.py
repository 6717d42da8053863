"""The loss by features and a head: that of whole logits, with its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mdiff.backbones.bit_transformer import bit_transformer
from mdiff.backbones.transformer import Transformer, transformer
from mdiff.kernels.loss_heads import MatrixHead
from mdiff.objective.bound import nll_bound
from mdiff.objective.loss import masked_diffusion_loss
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace


class Wrapped(nn.Module):
    """A denoiser whose call is another's, and which shows neither features nor a head."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.uses_time = inner, inner.uses_time

    def forward(self, tokens, **rest):
        return self.inner(tokens, **rest)


BACKBONES = {
    "tied": lambda: transformer(vocab_size=9, width=16, depth=1, heads=2, tie=True),
    "time and label": lambda: transformer(
        vocab_size=9, width=16, depth=1, heads=2, uses_time=True, classes=3
    ),
    "bits": lambda: bit_transformer(
        grid=[2, 3], bits=6, groups=2, width=16, depth=1, heads=2, mask_vector=True
    ),
}


def small_model(name):
    torch.manual_seed(0)
    model = BACKBONES[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)
    return model


def loss_of(model, inner=None, **options):
    """The loss on a small batch that `inner` can read, and the batch's tokens."""
    config = (inner or model).config
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, config.vocab_size - 1, (4, 12), generator=generator)
    options = {
        "space": TokenSpace(config.vocab_size, config.mask_id, never=(0,)),
        "schedule": Linear(), "seed": 3, "label_smoothing": 0.1, **options,
    }  # fmt: skip
    if getattr(config, "classes", 0):
        options["cond"] = {"label": torch.tensor([0, 1, 2, 3])}
    return masked_diffusion_loss(model, tokens, **options)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_features_and_a_head_give_the_loss_and_the_gradients_of_whole_logits(name):
    model = small_model(name)
    vocab = model.config.vocab_size
    parts = TokenSpace(vocab, model.config.mask_id, parts=((6, 1, vocab), (6, 2, vocab - 1)))
    for options in ({}, {"space": parts}, {"weight": "uniform", "label_smoothing": 0.0}):
        ours = loss_of(model, **options)
        theirs = loss_of(Wrapped(model), model, **options)
        assert bool(ours.hidden.any())
        torch.testing.assert_close(ours.value, theirs.value, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours.nll, theirs.nll, rtol=1e-12, atol=0)
        parameters = list(model.parameters())
        mine, others = (
            torch.autograd.grad(each.value, parameters, materialize_grads=True)
            for each in (ours, theirs)
        )
        torch.testing.assert_close(mine, others, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_head_reads_the_hidden_rows_alone_and_never_whole_logits(monkeypatch, name):
    model, rows = small_model(name), []
    logits = MatrixHead.logits

    def counted(self, part):
        found = logits(self, part)
        rows.append(len(found))
        return found

    def refuse(self, x):
        raise AssertionError("the head was called as a whole")

    monkeypatch.setattr(MatrixHead, "logits", counted)
    monkeypatch.setattr(type(model.head), "forward", refuse)
    loss = loss_of(model)
    loss.value.backward()
    assert sum(rows) == int(loss.hidden.sum())


def test_the_bound_by_features_and_a_head_is_that_by_whole_logits():
    model = small_model("tied")
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    options = {"space": TokenSpace(9, mask_id=9), "schedule": Linear(), "seed": 0}
    for estimator in ("exact", "time"):
        ours, theirs = (
            nll_bound(each, tokens, estimator=estimator, draws=4, **options)
            for each in (model, Wrapped(model))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Sharpened(Transformer):
    """A model whose call is no longer its features and its head."""

    def forward(self, tokens, **rest):
        return 2 * super().forward(tokens, **rest)


def test_a_class_or_a_hook_that_changes_the_call_is_not_passed_over():
    model = small_model("tied")
    plain = loss_of(model)
    sharp = Sharpened(model.config).double()
    sharp.load_state_dict(model.state_dict())
    expected = loss_of(Wrapped(sharp), sharp)
    assert not torch.allclose(expected.value, plain.value)
    assert torch.equal(loss_of(sharp).value, expected.value)
    for module in (model, model.head):
        handle = module.register_forward_hook(lambda module, given, logits: 2 * logits)
        assert torch.equal(loss_of(model).value, expected.value)
        handle.remove()
    torch.testing.assert_close(loss_of(model).value, plain.value, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["qkv"], ["qkv", "head"]], ids=["trunk", "head"])
def test_adapters_are_trained_whether_the_wrapper_or_the_model_is_called(targets):
    from peft import LoraConfig, get_peft_model

    base = small_model("time and label")
    before = loss_of(base).value
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).double()
    expected = loss_of(Wrapped(adapted), base)
    assert not torch.allclose(expected.value, before)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected.value, trained)
    for model in (adapted, base):
        found = loss_of(model, base)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=0)
        mine = torch.autograd.grad(found.value, trained)
        torch.testing.assert_close(mine, gradients, rtol=1e-10, atol=1e-12)


def test_distributed_gradients_are_those_of_one_process(tmp_path):
    """The objective is wrapped as a whole, so that the model inside is itself."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    class Objective(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self):
            return loss_of(self.model).value

    model = small_model("tied")
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss_of(model).value, parameters)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        DistributedDataParallel(Objective(model))().backward()
    finally:
        distributed.destroy_process_group()
    found = [parameter.grad for parameter in parameters]
    torch.testing.assert_close(found, list(expected), rtol=1e-12, atol=1e-14)
