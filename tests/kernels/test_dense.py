"""The dense operations with forms of their own on the CPU, beside torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mdiff.kernels import dense
from mdiff.kernels.dense import attend, dropout, linear, rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_is_torchs_and_so_is_its_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(8, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, 8, generator=generator).to(dtype)
    ours = rms_norm(x, weight)
    gradients = torch.autograd.grad(ours, (x, weight), upstream)
    truth = nn.functional.rms_norm(x.double(), (8,), weight.double(), 1e-6)
    expected = torch.autograd.grad(truth, (x, weight), upstream.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for one, other in zip((ours, *gradients), (truth, *expected), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other.double(), atol=tolerance, rtol=tolerance)


def test_a_row_of_zeros_normalises_to_zeros():
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4)).sum().backward()
    assert torch.equal(rms_norm(x, torch.ones(4)), torch.zeros(2, 4))
    assert bool(x.grad.isfinite().all())


@pytest.mark.skipif(not dense.HAS_ONEDNN, reason="this torch is built without oneDNN")
def test_the_product_of_onednn_is_the_product(monkeypatch):
    """Large float32 products without gradients take it; all others take torch's own."""
    ran = []
    product = dense.onednn_linear
    monkeypatch.setattr(dense, "onednn_linear", lambda *args: ran.append(1) or product(*args))
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 70, 96), (500, 96)))
    true = (x.double() @ weight.double().T).float()
    with torch.no_grad():
        assert torch.allclose(linear(x, weight), true, atol=1e-4)
        assert torch.allclose(linear(x[:, ::2], weight[:490]), true[:, ::2, :490], atol=1e-4)
        assert len(ran) == 2
        linear(x.double(), weight.double())
        linear(x[:, :1], weight[:20])
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
    assert torch.allclose(linear(x, weight.requires_grad_()), true, atol=1e-4)
    assert len(ran) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_half_precision_is_widened_where_the_processor_lacks_it(monkeypatch, dtype, with_gradient):
    """Then a product is that of float32, rounded once; its gradient has the type of its input."""
    monkeypatch.setattr(dense, "has_fast_product", lambda asked: asked == torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_(with_gradient)
        for shape in ((2, 70, 96), (500, 96))
    )
    y = linear(x, weight)
    assert y.dtype == dtype
    exact = x.detach().double() @ weight.detach().double().T
    half_a_unit = torch.finfo(dtype).eps / 2
    assert bool(((y.detach().double() - exact).abs() <= half_a_unit * exact.abs() + 1e-4).all())
    if with_gradient:
        slope, weight_slope = torch.autograd.grad(y.sum(), (x, weight))
        assert (slope.dtype, weight_slope.dtype) == (dtype, dtype)
        assert torch.allclose(slope[0, 0].double(), weight.detach().double().sum(0), rtol=0.02)


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (False, True), (True, False)])
def test_attention_in_training_is_torchs_and_so_is_its_gradient(causal, masked):
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(3)
    ]
    mask = torch.rand(2, 1, 7, 7, generator=generator) < 0.5 if masked else None
    mask = None if mask is None else mask | torch.eye(7, dtype=torch.bool)
    ours = attend(*inputs, mask, causal=causal)
    theirs = nn.functional.scaled_dot_product_attention(*inputs, mask, is_causal=causal)
    for one, other in zip(
        (ours, *torch.autograd.grad(ours.square().sum(), inputs)),
        (theirs, *torch.autograd.grad(theirs.square().sum(), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    """A million entries: six standard deviations of the share are 0.0024."""
    torch.manual_seed(0)
    found = dropout(torch.ones(1000, 1000), 0.2)
    share = round(0.2 * 256) / 256
    assert abs(float((found == 0).double().mean()) - share) < 0.0024
    assert torch.equal(found.unique(), torch.tensor([0.0, 1 / (1 - share)]))
