"""The loss's kernel in Triton's interpreter, beside the torch form and the plain path."""

from __future__ import annotations

import pytest
import torch
from interpreted import LOSS, interpreter  # noqa: F401 (a fixture that pytest finds by name)
from loss_cases import COLUMNS, HEADS, OPTIONS, WIDTH, head_of, relative, rows_of
from torch import nn

from mdiff.errors import BackendError
from mdiff.kernels import loss_heads, loss_rows
from mdiff.kernels.loss_rows import Rows
from mdiff.ops import backend as backends
from mdiff.ops import masked_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
SPAN = torch.tensor([[3, 300], [0, 337], [100, 101], [64, 128], [8, 20]])
FORBIDDEN = (0, 8, 130, 336)
CASES = [
    {}, {"forbidden": FORBIDDEN}, {"smoothing": 0.1}, {"span": SPAN},
    {"forbidden": FORBIDDEN, "span": SPAN, "smoothing": 0.3},
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that a row has several of."""
    monkeypatch.setattr(loss_rows, "BLOCK", 64)


def normal(rows=5, columns=337, seed=0):
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 20


def by_torch(rows, logits, weight, differentiate=True):
    wide = logits.double()
    nll, smooth, total = rows.loss_(wide, slice(0, len(wide)), differentiate=differentiate)
    return nll, smooth, wide * (weight[:, None] / total)


def by_triton(rows, logits, weight, differentiate=True):
    made = logits.clone()
    every = slice(0, len(made))
    return *rows.by_triton_(made, weight, every, differentiate=differentiate), made


def case(forbidden=(), span=None, smoothing=0.0):
    targets = torch.tensor([5, 336, 100, 64, 19])
    return Rows(targets, forbidden, span, smoothing), torch.tensor([1.0, 0.3, 2.0, 0.0, 7.0])


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("columns", [337, 340])
def test_the_kernel_gives_the_loss_and_gradient_of_float64(options, columns, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    rows, weight = case(**options)
    true, found = (way(rows, normal(columns=columns), weight) for way in (by_torch, by_triton))
    for a, b in zip(found, true):
        assert a.dtype == torch.float32
        assert torch.equal(a.isinf(), b.isinf())
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_logits_become_a_gradient_of_their_type(kind):
    rows, weight = case(forbidden=FORBIDDEN, smoothing=0.1)
    logits = normal().to(kind)
    true, found = (way(rows, logits, weight) for way in (by_torch, by_triton))
    assert found[2].dtype == kind
    assert torch.allclose(found[1].double(), true[1], rtol=1e-6, equal_nan=True)
    assert torch.allclose(found[2].double(), true[2].to(kind).double(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65])
def test_any_number_of_columns(columns):
    rows = Rows(torch.tensor([0, columns - 1]), (), None, 0.1)
    weight = torch.tensor([1.0, 2.0])
    true, found = (way(rows, normal(2, columns), weight) for way in (by_torch, by_triton))
    for a, b in zip(found, true):
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6)


def test_rows_without_a_law_have_nan_and_spoil_no_other():
    rows, weight = case()
    logits = normal()
    logits[0, 200] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, :300] = -torch.inf
    nll, _, gradient = by_triton(rows, logits, weight)
    true = by_torch(rows, logits, weight)
    assert nll.isnan().tolist() == [True, True, True, False, False]
    assert nll[3].isinf()
    assert torch.allclose(gradient[4].double(), true[2][4], atol=1e-6)
    assert not gradient[3].isnan().any()


def test_without_a_gradient_the_logits_are_left_as_they_are():
    rows, weight = case()
    logits = normal()
    nll, _, same = by_triton(rows, logits, weight, differentiate=False)
    assert torch.equal(same, logits)
    assert torch.equal(nll, by_triton(rows, logits, weight)[0])


def test_rows_lie_anywhere_and_what_is_beside_them_is_not_touched():
    wide, (rows, weight) = normal(10, 400), case()
    logits, before = wide[::2, 30:367], wide.clone()
    true = by_triton(rows, logits.contiguous(), weight)
    rows.by_triton_(logits, weight, slice(0, 5), differentiate=True)
    assert torch.equal(logits, true[2])
    wide[::2, 30:367] = before[::2, 30:367]
    assert torch.equal(wide, before)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["never and smoothing"]], ids=str)
@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_has_the_value_and_the_gradients_of_torch(name, options, monkeypatch):
    ran = []
    kernel = LOSS.loss_kernel
    assert type(kernel).__name__ == "InterpretedFunction"

    class Watched:
        def __getitem__(self, grid):
            ran.append(grid)
            return kernel[grid]

    monkeypatch.setattr(LOSS, "loss_kernel", Watched())
    monkeypatch.setattr(loss_heads, "HAS_ONEDNN", False)
    found = {}
    for backend in ("torch", "triton"):
        head = head_of(name, torch.float32)
        features, targets, weights, hidden = rows_of(torch.float32)
        out = masked_cross_entropy(
            features, head, targets, rows=hidden, weights=weights, chunk=4, backend=backend,
            **options,
        )  # fmt: skip
        out.value.backward()
        gradients = [p.grad for p in (features, *head.parameters()) if p.grad is not None]
        found[backend] = [out.value.detach(), out.nll, *gradients]
    assert len(ran) == -(-int(hidden.sum()) // 4)
    assert len(found["torch"]) == len(found["triton"]) >= 4
    for mine, other in zip(found["triton"], found["torch"]):
        assert relative(mine, other) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rows_of_logits_that_begin_apart_give_the_same(backend, kind, monkeypatch):
    found = []
    for apart in (1, 8):
        monkeypatch.setitem(loss_heads.ALIGNED, "cpu", apart)
        head = head_of("bias", kind)
        features, targets, weights, hidden = rows_of(kind)
        given = {"rows": hidden, "weights": weights, "chunk": 4, "backend": backend}
        out = masked_cross_entropy(features, head, targets, **given)
        out.value.backward()
        found.append([out.value.detach(), features.grad, head.weight.grad, head.bias.grad])
    for one, two in zip(*found):
        assert relative(one, two) < (1e-6 if kind == torch.float32 else 1e-2)


def test_a_model_in_bfloat16_keeps_its_type_and_its_loss_is_float32():
    head = head_of("bias", torch.bfloat16)
    features, targets, weights, hidden = rows_of(torch.bfloat16)
    given = {"rows": hidden, "weights": weights}
    out = masked_cross_entropy(features, head, targets, backend="triton", **given)
    out.value.backward()
    theirs = masked_cross_entropy(features, head, targets, backend="torch", **given)
    assert head.weight.grad.dtype == torch.bfloat16
    assert out.value.dtype == torch.float32
    assert relative(out.nll, theirs.nll) < 1e-6


def test_the_backend_of_the_draw_is_that_of_the_loss(monkeypatch):
    asked = []

    def by_triton_(self, *given, **options):
        asked.append(1)
        return original(self, *given, **options)

    original = Rows.by_triton_
    monkeypatch.setattr(Rows, "by_triton_", by_triton_)
    features, head = torch.randn(3, WIDTH), nn.Linear(WIDTH, COLUMNS)
    targets = torch.tensor([1, 2, 3])
    monkeypatch.delenv("MDIFF_BACKEND", raising=False)
    masked_cross_entropy(features, head, targets)
    assert not asked
    monkeypatch.setenv("MDIFF_BACKEND", "triton")
    masked_cross_entropy(features, head, targets)
    assert asked == [1]
    masked_cross_entropy(features.double(), head.double(), targets)
    assert asked == [1]
    monkeypatch.setattr(backends, "triton_why_not", lambda device: "no interpreter")
    with pytest.raises(BackendError, match="no interpreter"):
        masked_cross_entropy(features, head, targets)
