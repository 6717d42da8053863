"""The loss of features and a head: its value and gradients are those of the plain path."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_cases import (
    COLUMNS,
    HEADS,
    OPTIONS,
    WIDTH,
    both,
    head_of,
    plain,
    relative,
    rows_of,
)
from torch import nn

from mdiff.backbones.transformer import Head
from mdiff.kernels import loss_heads
from mdiff.ops import masked_cross_entropy

every_head = pytest.mark.parametrize("name", sorted(HEADS))


@pytest.mark.parametrize("chunk", [1, 4, 1000, None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_head
def test_it_is_the_plain_path_to_rounding(name, options, chunk):
    ours, theirs = both(head_of(name), rows_of(), options, chunk=chunk)
    for mine, other in zip((*ours[:2], *ours[2]), (*theirs[:2], *theirs[2])):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@every_head
def test_gradients_in_float32_are_those_of_float64(name, options):
    """Against float64, so that the plain path's own rounding is not what is measured."""
    head = head_of(name, torch.float32)
    ours, _ = both(head, rows_of(torch.float32, 8, 12), options, chunk=40)
    double = [part.detach().double() if part.is_floating_point() else part
              for part in rows_of(torch.float32, 8, 12)]  # fmt: skip
    for part in (double[0], double[2]):
        part.requires_grad_()
    _, theirs = both(copy.deepcopy(head).double(), double, options)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert relative(ours[0], theirs[0]) < 1e-6
    for mine, other in zip(ours[2], theirs[2]):
        assert relative(mine, other) < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_not_permitted_costs_what_the_plain_path_says(smoothing):
    """A target that is never generated, and one whose logit is -inf: the same infinities."""
    head, data = head_of("bias"), rows_of()
    with torch.no_grad():
        head.bias[11] = -torch.inf
    data[1][0], data[1][1] = 7, 11
    data[3][:] = True
    ours, theirs = both(head, data, {"never": (7,), "label_smoothing": smoothing}, chunk=4)
    assert ours[1].isinf().sum() == 10
    for mine, other in zip((*ours[:2], *ours[2]), (*theirs[:2], *theirs[2])):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_row_of_nan_shows_in_the_value_and_spoils_no_other_row():
    head, data = head_of("bias"), rows_of()
    with torch.no_grad():
        data[0][2, 0, 0] = torch.nan
    data[3][:] = True
    ours, theirs = both(head, data, {"never": (7,)}, chunk=4)
    assert bool(ours[0].isnan())
    for mine, other in ((ours[1], theirs[1]), (ours[2][0], theirs[2][0])):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert ours[1].isnan().sum() == 1
    assert ours[2][0].isnan().any(2).sum() == 1


@every_head
def test_the_gradient_is_the_derivative(name):
    head, (features, targets, weights, rows) = head_of(name), rows_of(length=2)

    def value(features, weights, *parameters):
        del parameters
        return masked_cross_entropy(
            features, head, targets, rows=rows, weights=weights, never=(7,), label_smoothing=0.1,
            chunk=2,
        ).value  # fmt: skip

    assert torch.autograd.gradcheck(value, (features, weights, *head.parameters()))


@every_head
def test_without_hidden_rows_the_loss_is_zero_and_every_gradient_too(name):
    head, (features, targets, weights, rows) = head_of(name), rows_of()
    found = masked_cross_entropy(
        features, head, targets, rows=torch.zeros_like(rows), weights=weights, never=(7,)
    )
    assert found.nll.shape == (0,)
    assert found.value.item() == 0
    found.value.backward()
    for tensor in (features, *head.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("name", ["bias", "module"])
def test_what_needs_no_gradient_gets_none(name):
    head, (features, targets, _, rows) = head_of(name), rows_of()
    whole = masked_cross_entropy(features, head, targets, rows=rows)
    expected = torch.autograd.grad(whole.value, [features, *head.parameters()])
    fixed = masked_cross_entropy(features.detach(), head, targets, rows=rows, chunk=2)
    found = torch.autograd.grad(fixed.value, list(head.parameters()))
    torch.testing.assert_close(found, expected[1:], rtol=1e-12, atol=1e-12)
    next(head.parameters()).requires_grad_(False)
    some = masked_cross_entropy(features, head, targets, rows=rows, chunk=2).value
    some.backward()
    assert next(head.parameters()).grad is None
    torch.testing.assert_close(features.grad, expected[0], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        silent = masked_cross_entropy(features, head, targets, rows=rows)
    head.requires_grad_(False)
    frozen = masked_cross_entropy(features.detach(), head, targets, rows=rows)
    for each in (silent, frozen):
        assert not each.value.requires_grad
        assert torch.equal(each.value, whole.value)
        assert torch.equal(each.nll, whole.nll)
    assert not whole.nll.requires_grad


def test_without_a_gradient_no_work_is_done_for_one(monkeypatch):
    def refuse(self, *rest):
        raise RuntimeError("a gradient was computed")

    monkeypatch.setattr(loss_heads.MatrixHead, "take", refuse)
    head, (features, targets, _, rows) = head_of("bias"), rows_of()
    with torch.no_grad():
        masked_cross_entropy(features, head, targets, rows=rows)
    with pytest.raises(RuntimeError, match="a gradient was computed"):
        masked_cross_entropy(features, head, targets, rows=rows)


def test_rows_that_are_not_hidden_are_not_computed():
    """NaN in their features reaches nothing."""
    head, (features, targets, _, rows) = head_of("module"), rows_of()
    sizes = []
    head.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    poisoned = features.detach().masked_fill(~rows[..., None], torch.nan).requires_grad_()
    found = masked_cross_entropy(poisoned, head, targets, rows=rows, chunk=4)
    found.value.backward()
    assert sum(sizes) == int(rows.sum())
    assert max(sizes) == 4
    assert bool(poisoned.grad.isfinite().all())
    assert not poisoned.grad[~rows].any()


def test_targets_and_weights_may_be_those_of_the_hidden_rows_already():
    head, (features, targets, weights, rows) = head_of("bias"), rows_of()
    whole = masked_cross_entropy(features, head, targets, rows=rows, weights=weights)
    chosen = masked_cross_entropy(
        features, head, targets[rows], rows=rows, weights=weights[rows].float()
    )
    gathered = masked_cross_entropy(features[rows], head, targets[rows], weights=weights[rows])
    torch.testing.assert_close(whole, gathered, rtol=1e-15, atol=0)
    torch.testing.assert_close(whole.value, chosen.value, rtol=1e-6, atol=0)


def test_a_tied_matrix_gets_both_gradients_and_its_last_row_only_the_embeddings():
    torch.manual_seed(0)
    embedding = nn.Embedding(COLUMNS + 1, WIDTH).double()
    head = Head(WIDTH, COLUMNS, COLUMNS + 1, 0.5).double()
    head.weight = embedding.weight
    tokens = torch.tensor([[1, COLUMNS, 5, COLUMNS]])
    rows = tokens == COLUMNS
    targets = torch.tensor([[1, 2, 5, 9]])
    features = embedding(tokens) + embedding(tokens).roll(1, 1)
    masked_cross_entropy(features, head, targets, rows=rows, chunk=1).value.backward()
    found = embedding.weight.grad.clone()
    embedding.weight.grad = None
    features = embedding(tokens) + embedding(tokens).roll(1, 1)
    plain(features, head, targets, rows, torch.ones(1, 4).double())[0].backward()
    torch.testing.assert_close(found, embedding.weight.grad, rtol=1e-12, atol=1e-12)
    assert bool(found[COLUMNS].any())


@pytest.mark.parametrize("name", ["bias", "one row more", "masked language model"])
def test_under_autocast_the_logits_are_the_heads_and_the_sums_are_float32(name):
    head, data = head_of(name, torch.float32), rows_of(torch.float32, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(head, data, {"never": (7,)}, chunk=30)
        assert head(data[0]).dtype == torch.bfloat16
    # The same logits, so that a row's loss differs by the rounding of float32 alone.
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    exact = both(head, data, {"never": (7,)})[1]
    assert not torch.allclose(exact[1], theirs[1], rtol=1e-5, atol=1e-5)
    for mine, other, true in zip(ours[2], theirs[2], exact[2]):
        assert mine.dtype == other.dtype == torch.float32
        assert relative(mine, other) < 1e-2
        assert relative(mine, true) < 2 * max(relative(other, true), 1e-3)


def test_a_model_in_bfloat16_has_gradients_in_bfloat16_and_a_loss_in_float32():
    head, data = head_of("bias", torch.bfloat16), rows_of(torch.bfloat16, 8, 12)
    ours, theirs = both(head, data, {}, chunk=30)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
    for mine, other in zip(ours[2], theirs[2]):
        assert mine.dtype == torch.bfloat16
        assert relative(mine, other) < 2e-2
