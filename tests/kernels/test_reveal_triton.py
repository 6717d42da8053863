"""The reveal in Triton's interpreter: which positions of each sample, and what is written there."""

from __future__ import annotations

import pytest
import torch
from interpreted import SELECT, interpreter  # noqa: F401 (a fixture that pytest finds by name)

from mdiff.kernels import reveal_triton as module
from mdiff.kernels.reference import Draw
from mdiff.kernels.reveal_torch import reveal_torch
from mdiff.kernels.reveal_triton import reveal_triton

COUNT = torch.tensor([0, 3, 4, 100, 7])
LENGTH = 37


def a_step(kind=torch.float32, length=LENGTH, seed=0):
    """A canvas, its requested positions (none of the third sample), their draws and tied scores."""
    generator = torch.Generator().manual_seed(seed)
    samples = len(COUNT)
    requested = torch.rand(samples, length, generator=generator) < 0.6
    requested[2] = False
    rows = int(requested.sum())
    tokens = torch.randint(0, 99, (samples, length), generator=generator)
    score = torch.randint(-5, 6, (rows,), generator=generator).to(kind) / 5
    figures = torch.randn(3, rows, generator=generator).to(kind)
    drawn = Draw(torch.randint(100, 200, (rows,), generator=generator), *figures)
    return tokens, requested, drawn, score


def expected(tokens, requested, drawn, score, count, threshold):
    """The same by a Python loop over samples and sorted positions."""
    out, at = tokens.clone(), torch.zeros_like(requested)
    log_prob = torch.zeros(tokens.shape, dtype=drawn.log_prob.dtype)
    entropy = torch.zeros_like(log_prob)
    row = 0
    for b in range(len(tokens)):
        positions = requested[b].nonzero()[:, 0].tolist()
        rows = range(row, row + len(positions))
        row += len(positions)
        order = sorted(zip((-score[list(rows)]).tolist(), positions, rows))
        for rank, (_, position, n) in enumerate(order):
            if rank < count[b] or (threshold is not None and score[n] >= threshold):
                out[b, position], at[b, position] = drawn.tokens[n], True
                log_prob[b, position], entropy[b, position] = drawn.log_prob[n], drawn.entropy[n]
    return out, at, log_prob, entropy


def test_it_is_triton_that_runs():
    assert type(SELECT.reveal_kernel).__name__ == "InterpretedFunction"


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("threshold", [None, 0.6, 1.0])
def test_the_best_positions_of_each_sample_are_written(kind, threshold):
    tokens, requested, drawn, score = a_step(kind)
    before = tokens.clone()
    found = reveal_triton(tokens, requested, drawn, score, count_B=COUNT, threshold=threshold)
    assert torch.equal(tokens, before)
    true = expected(tokens, requested, drawn, score, COUNT, threshold)
    for a, b in zip(found, true):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert found.at[2].sum() == 0
    assert found.at[3].sum() == requested[3].sum()


@pytest.mark.parametrize("threshold", [None, 0.2, -torch.inf])
def test_nan_and_infinite_scores_rank_as_in_torch(threshold):
    tokens, requested, drawn, score = a_step(seed=1)
    for position, value in enumerate([torch.nan, -torch.inf, torch.inf, -0.0, 0.0, torch.nan]):
        score[position::11] = value
    lowest = torch.finfo(torch.float32).min
    score[40] = lowest
    options = {"count_B": COUNT + 5, "threshold": threshold}
    one = reveal_triton(tokens, requested, drawn, score, **options)
    two = reveal_torch(tokens, requested, drawn, score, **options)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


@pytest.mark.parametrize("length", [1, 2, 64])
def test_any_length_and_layout_agree_with_torch(length):
    tokens, requested, drawn, score = a_step(length=length, seed=2)
    tokens, requested = tokens.T.contiguous().T, requested.T.contiguous().T
    one = reveal_triton(tokens, requested, drawn, score, count_B=COUNT)
    two = reveal_torch(tokens, requested, drawn, score, count_B=COUNT)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_a_batch_is_revealed_as_its_samples_alone():
    """More positions before a sample than are counted at a time."""
    tokens, requested, drawn, score = a_step(length=4000, seed=3)
    whole = reveal_triton(tokens, requested, drawn, score, count_B=COUNT, threshold=0.9)
    first = int(requested[:4].sum())
    alone = reveal_triton(
        tokens[4:], requested[4:], Draw(*(field[first:] for field in drawn)), score[first:],
        count_B=COUNT[4:], threshold=0.9,
    )  # fmt: skip
    assert all(torch.equal(a[4:], b) for a, b in zip(whole, alone))


def test_every_output_is_written(monkeypatch):
    empty = torch.empty

    def poisoned(*shape, dtype, device):
        fill = {torch.bool: True, torch.int64: -1}.get(dtype, torch.nan)
        return empty(*shape, dtype=dtype, device=device).fill_(fill)

    monkeypatch.setattr(torch, "empty", poisoned)
    tokens, requested, drawn, score = a_step()
    found = reveal_triton(tokens, requested, drawn, score, count_B=COUNT)
    monkeypatch.undo()
    for a, b in zip(found, expected(tokens, requested, drawn, score, COUNT, None)):
        assert torch.equal(a, b)


def test_without_a_reason_to_run_it_refuses(monkeypatch):
    monkeypatch.setattr(module, "why_not", lambda device: f"not on {device}")
    with pytest.raises(RuntimeError, match="not on cpu"):
        reveal_triton(*a_step(), count_B=COUNT)
