"""The chunked loss: the plain path's numbers and gradients, without its memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

from mdiff.backbones.transformer import Head
from mdiff.errors import ConfigError
from mdiff.kernels import loss, loss_heads
from mdiff.kernels.loss_heads import linear_map
from mdiff.ops import masked_cross_entropy

WIDTH, COLUMNS = 6, 23


def bert_head():
    """A dense layer, a norm and a decoder with a bias: the head of a tiny masked language model."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForMaskedLM(BertConfig(vocab_size=COLUMNS, hidden_size=WIDTH, **shape)).cls


HEADS = {
    "bias": lambda: nn.Linear(WIDTH, COLUMNS),
    "no bias": lambda: nn.Linear(WIDTH, COLUMNS, bias=False),
    "one row more": lambda: Head(WIDTH, COLUMNS, COLUMNS + 1, 0.5),
    "masked language model": bert_head,
    "module": lambda: nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, COLUMNS)),
}
OPTIONS = {
    "plain": {},
    "never": {"never": (0, 7, 22)},
    "smoothing": {"label_smoothing": 0.1},
    "never and smoothing": {"never": (7,), "label_smoothing": 0.3},
    "spans": {"spans": True},
    "all": {"spans": True, "never": (0, 7, 22), "label_smoothing": 0.1},
}
every_head = pytest.mark.parametrize("name", sorted(HEADS))


def head_of(name, dtype=torch.float64):
    torch.manual_seed(3)
    head = HEADS[name]().to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            nn.init.normal_(parameter, std=0.7)
    return head


def rows_of(dtype=torch.float64, batch=3, length=5, seed=1, columns=COLUMNS, width=WIDTH):
    """Features, targets, weights and which are hidden; targets are from 8 to below 20."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, length, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(8, min(columns, 20), (batch, length), generator=generator)
    weights = torch.rand(batch, length, generator=generator) * 3
    hidden = torch.rand(batch, length, generator=generator) < 0.7
    return features, targets, weights.to(dtype).requires_grad_(), hidden


def spans_of(count):
    """Two kinds of rows, whose targets lie within both kinds of span."""
    return torch.tensor([[2, 21], [8, 23]]).repeat(count, 1)[:count]


def plain(features, head, targets, rows, weights, *, spans=None, never=(), label_smoothing=0.0):
    """All logits, every id that is not permitted at -inf, and autograd."""
    logits = head(features)[rows]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    blocked = torch.zeros(logits.shape, dtype=torch.bool)
    blocked[:, list(never)] = True
    if spans is not None:
        ids = torch.arange(logits.shape[1])
        blocked |= (ids < spans[:, :1]) | (ids >= spans[:, 1:])
    log_p = logits.masked_fill(blocked, -torch.inf).log_softmax(1)
    nll = -log_p.gather(1, targets[rows][:, None])[:, 0]
    smooth = nll
    if label_smoothing:
        spread = -log_p.masked_fill(blocked, 0).sum(1) / (~blocked).sum(1)
        smooth = (1 - label_smoothing) * nll + label_smoothing * spread
    return (weights[rows] * smooth).sum(), nll


def both(head, data, options, *, chunk=None, factor=1.7):
    """(value, nll, gradients) of the chunked and of the plain path."""
    features, targets, weights, rows = data
    options = dict(options)
    spans = spans_of(int(rows.sum())) if options.pop("spans", False) else None
    inputs = [features, weights, *head.parameters()]
    ours = masked_cross_entropy(
        features, head, targets, rows=rows, weights=weights, span=spans, chunk=chunk, **options
    )
    theirs = plain(features, head, targets, rows, weights, spans=spans, **options)
    return [
        (value, nll, torch.autograd.grad(factor * value, inputs)) for value, nll in (ours, theirs)
    ]


def relative(ours, theirs):
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


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


class Largest(TorchDispatchMode):
    """The most elements of one new tensor, but for gradients of the shapes that are known."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tuple(tensor.shape) for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tuple(tensor.shape) not in self.known:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // 4)
        return out


@pytest.mark.parametrize("name", ["matrix", "module"])
@pytest.mark.parametrize("options", [{}, {"never": (3,), "label_smoothing": 0.1}])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(name, options):
    columns, chunk = 3000, 40
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, columns)
    if name == "module":
        head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), head)
    features = torch.randn(300, WIDTH).requires_grad_()
    targets = torch.randint(4, columns, (300,))
    with Largest(*head.parameters()) as ours:
        masked_cross_entropy(features, head, targets, chunk=chunk, **options).value.backward()
    assert 0 < ours.numel <= chunk * columns
    with Largest(*head.parameters()) as theirs:
        F.cross_entropy(head(features), targets).backward()
    assert theirs.numel == 300 * columns


@pytest.mark.parametrize("count", [7, 100, 1000])
def test_chunks_are_even_and_below_the_limit(monkeypatch, count):
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 4 * COLUMNS * 64)
    sizes = []
    take = loss_heads.MatrixHead.take
    monkeypatch.setattr(
        loss_heads.MatrixHead,
        "take",
        lambda self, gradient, *rest: sizes.append(len(gradient)) or take(self, gradient, *rest),
    )
    features = torch.randn(count, WIDTH, requires_grad=True)
    masked_cross_entropy(features, nn.Linear(WIDTH, COLUMNS), torch.zeros(count).long())
    assert sum(sizes) == count
    assert len(sizes) == -(-count // 64)
    assert max(sizes) <= 64
    assert max(sizes) - min(sizes) < len(sizes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onednn", [True, False])
def test_both_ways_to_multiply_agree_and_each_runs_where_it_is_meant(monkeypatch, onednn, bias):
    if onednn and not loss_heads.HAS_ONEDNN:
        pytest.skip("this torch is built without oneDNN")
    calls = []
    product = loss_heads.onednn_linear
    monkeypatch.setattr(loss_heads, "HAS_ONEDNN", onednn)
    monkeypatch.setattr(loss_heads, "TILE", 64)
    monkeypatch.setattr(
        loss_heads, "onednn_linear", lambda *rest: calls.append(1) or product(*rest)
    )  # fmt: skip
    torch.manual_seed(0)
    head = nn.Linear(33, 150, bias=bias)
    data = rows_of(torch.float32, 10, 12, columns=150, width=33)
    ours, theirs = both(head, data, {}, chunk=40)
    chunks, tiles = -(-int(data[3].sum()) // 40), -(-150 // (64 * torch.get_num_threads()))
    # The last chunk is not too small: the memory of one chunk decides for all.
    assert len(calls) == (3 * chunks * tiles if onednn else 0)
    for mine, other in zip(ours[2], theirs[2]):
        assert relative(mine, other) < 1e-6
    calls.clear()
    both(head.double(), rows_of(columns=150, width=33), {})
    assert not calls


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


@pytest.mark.parametrize("name", ["bias", "module"])
def test_a_graph_may_be_used_twice_and_gradients_add_up(name):
    head, (features, targets, weights, rows) = head_of(name), rows_of()
    inputs = [features, weights, *head.parameters()]

    def fresh():
        return masked_cross_entropy(features, head, targets, rows=rows, weights=weights, chunk=4)

    once = torch.autograd.grad(fresh().value, inputs)
    kept = fresh().value
    for _ in range(2):
        again = torch.autograd.grad(3 * kept, inputs, retain_graph=True)
        torch.testing.assert_close(again, tuple(3 * each for each in once), rtol=1e-12, atol=0)
    (kept + 2 * kept).backward()
    fresh().value.backward()
    for tensor, gradient in zip(inputs, once):
        torch.testing.assert_close(tensor.grad, 4 * gradient, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        kept.backward()


def test_a_second_derivative_is_refused():
    head, (features, targets, _, rows) = head_of("bias"), rows_of()
    value = masked_cross_entropy(features, head, targets, rows=rows).value
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, features, create_graph=True)


def test_hooks_of_parameters_run_once():
    head, (features, targets, _, rows) = head_of("module"), rows_of()
    expected = torch.autograd.grad(
        masked_cross_entropy(features, head, targets, rows=rows).value, list(head.parameters())
    )
    for parameter in head.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    masked_cross_entropy(features, head, targets, rows=rows, chunk=4).value.backward()
    for parameter, gradient in zip(head.parameters(), expected):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-12, atol=1e-14)


def test_the_same_call_gives_the_same_bits():
    head, data = head_of("bias", torch.float32), rows_of(torch.float32, 10, 12)
    (first, second) = (both(head, data, {"never": (7,)}, chunk=30)[0] for _ in range(2))
    for mine, other in zip((*first[:2], *first[2]), (*second[:2], *second[2])):
        assert torch.equal(mine, other)


class Capped(Head):
    """A head that is no longer its matrix."""

    def forward(self, x):
        return 3 * torch.tanh(super().forward(x) / 3)


def test_only_a_head_that_is_a_matrix_counts_as_one():
    for name in ("bias", "no bias", "one row more"):
        assert linear_map(HEADS[name]()) is not None
    hooked, replaced = (HEADS["bias"]() for _ in range(2))
    hooked.register_forward_hook(lambda module, given, logits: 2 * logits)
    replaced.forward = lambda x: torch.zeros(len(x), COLUMNS).double()
    others = (Capped(WIDTH, COLUMNS, COLUMNS, 0.5), hooked, replaced)
    assert [linear_map(head) for head in others] == [None, None, None]
    for head in others[:2]:
        ours, theirs = both(head.double(), rows_of(), {}, chunk=4)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_head_that_reads_what_is_not_its_own_is_refused():
    """Its gradient would be lost without a word."""
    outside = nn.Linear(WIDTH, COLUMNS).double()

    class Borrowed(nn.Module):
        def forward(self, x):
            return outside(x)

    features, targets, _, rows = rows_of()
    with pytest.raises(RuntimeError, match=r"Borrowed: .* is not its parameter"):
        masked_cross_entropy(features, Borrowed(), targets, rows=rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"chunk": 0}, "chunk=0"),
        ({"never": (-1,)}, "never"),
        ({"rows": torch.ones(3, 4, dtype=torch.bool)}, "rows"),
        ({"rows": torch.ones(3, 5)}, "rows"),
        ({"weights": torch.ones(4)}, "weights"),
        ({"span": torch.tensor([0, 5])}, "span"),
        ({"targets": torch.zeros(3, 4, dtype=torch.int64)}, "targets"),
        ({"head": lambda x: x}, "head"),
        ({"features": torch.zeros(3, 5, WIDTH, dtype=torch.int64)}, "features"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(change, message):
    features, targets, _, rows = rows_of()
    call = {"features": features, "head": head_of("bias"), "targets": targets, "rows": rows}
    with pytest.raises(ConfigError, match=message):
        masked_cross_entropy(**(call | change))
