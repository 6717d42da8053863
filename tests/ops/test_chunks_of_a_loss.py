"""The loss of features and a head: memory, autograd, and calls that are refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from loss_cases import (
    COLUMNS,
    HEADS,
    WIDTH,
    both,
    head_of,
    relative,
    rows_of,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mdiff.backbones.transformer import Head
from mdiff.errors import ConfigError
from mdiff.kernels import loss, loss_heads
from mdiff.kernels.loss_heads import linear_map
from mdiff.ops import masked_cross_entropy


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
