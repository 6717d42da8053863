"""Optimisers, learning rates and averaged weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mdiff.training.optim import AveragedWeights, Muon, optimizers, orthogonalised, rate_at
from mdiff.training.recipe import Optim


def test_the_rate_rises_then_falls_and_never_is_zero():
    for schedule in ("cosine", "linear"):
        settings = Optim(warmup_steps=10, schedule=schedule, final_lr=0.1)
        rates = [rate_at(step, steps=100, settings=settings) for step in range(1, 101)]
        assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
        assert rates[10] == 1
        assert all(a > b for a, b in pairwise(rates[10:]))
        assert 0.1 < rates[-1] < 0.12
    flat = Optim(warmup_steps=0, schedule="constant")
    assert {rate_at(step, steps=5, settings=flat) for step in range(1, 6)} == {1.0}


def test_muon_orthogonalises_and_its_update_has_the_size_of_adamws():
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 24), (24, 8), (16, 16)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        singular = torch.linalg.svdvals(orthogonalised(matrix))
        assert 0.5 < float(singular.min()) < float(singular.max()) < 1.3
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        weight.grad = matrix
        Muon([weight], lr=1.0).step()
        assert 0.1 < float(weight.detach().pow(2).mean().sqrt()) < 0.3
    assert torch.equal(orthogonalised(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_muon_agrees_with_the_one_of_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 4, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.1)
    peer = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        ours.grad = torch.randn(6, 4, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    # The peer's momentum is an average: the same direction before it is made orthogonal.
    assert torch.allclose(ours, theirs, atol=0.02)


def test_muon_takes_the_matrices_inside_and_adamw_the_rest():
    import toy_medium

    model = toy_medium.backbone(vocab_size=9)
    muon, adam = optimizers(model, Optim(name="muon", weight_decay=0.1))
    assert [p is model.inner[0].weight for p in muon.param_groups[0]["params"]] == [True]
    assert sum(len(group["params"]) for group in adam.param_groups) == 4
    (only,) = optimizers(model, Optim(name="adamw", weight_decay=0.1))
    decay = {id(p): group["weight_decay"] for group in only.param_groups for p in group["params"]}
    assert decay[id(model.inner[0].weight)] == 0.1
    assert decay[id(model.embedding.weight)] == decay[id(model.head.weight)] == 0


def test_averaged_weights_forget_the_first_ones_while_young():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    averaged = AveragedWeights(dict(model.named_parameters()), decay=0.999)
    nn.init.ones_(model.weight)
    averaged.update(dict(model.named_parameters()), step=1)
    assert float(averaged.tensors["weight"]) == pytest.approx(1 - 2 / 11)
