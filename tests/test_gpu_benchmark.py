"""What of benchmarks/gpu.py runs without a GPU: the law of its baselines, and its verdicts."""

from __future__ import annotations

import sys

import pytest
import torch
from folders import ROOT
from interpreted import interpreter  # noqa: F401 (a fixture that pytest finds by name)
from scipy import stats

FALSE_ALARM = 1e-6 / 3
LOGITS = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 1.5, 0.25]])


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("gpu", "loss", "machine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import gpu

    yield gpu
    for name in ("gpu", "loss", "machine"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize(("name", "rows"), [("llada", 100_000), ("mdlm", 100_000), ("race", 150)])
def test_a_baseline_draws_from_softmax_by_chi_square(bench, name, rows, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(bench, "RACE_LANES", 2)
    logits = LOGITS.expand(rows, -1).clone()
    if name == "mdlm":
        logits = torch.cat([logits, torch.full((rows, 1), 5.0)], 1)
    found = getattr(bench, name)(logits)
    tokens = found[0] if name == "llada" else found
    counts = torch.bincount(tokens, minlength=7).double()
    target = rows * LOGITS.double().softmax(1)[0]
    assert stats.chi2.sf(float(((counts - target) ** 2 / target).sum()), 6) > FALSE_ALARM
    if name == "llada":
        p = LOGITS.softmax(1)[0, tokens]
        assert torch.allclose(found[1], p, atol=1e-6)


def test_verdicts_say_which_goals_are_met(bench):
    draw = {"us": 70.0, "share_of_copy": 0.86, "bytes": 1, "time_a_byte_over_plain": 1.2}
    names = (
        "plain", "plain float32", "guidance, temperature, min_p", "temperature, top_k 50",
        "top_p 0.9",
    )  # fmt: skip
    figures = {
        "draw": dict.fromkeys(names, draw),
        "baselines": {name: {"us": 1.0, "over_ours": 7.0} for name in "abcde"},
        "block step": {"us": 11.0},
        "loss": {"times_faster": 4.5, "memory_share": 0.021},
    }
    met = {what: met for what, _, _, met in bench.verdicts(figures)}
    assert met["plain bfloat16, share of copy bandwidth"]
    assert not met["plain float32, share of copy bandwidth"]
    assert not met["temperature + top_k, a byte"]
    assert met["top_p, a byte"]
    assert met["block step of 32 rows, microseconds"]
    assert met["loss over logits of all rows"]
    assert not met["loss, share of their memory"]
    assert [met[f"over {name}"] for name in "abcde"] == [False, False, True, True, True]


def test_both_losses_have_the_same_gradients_and_the_share_is_of_what_is_not_one(
    bench, monkeypatch
):
    """A device that allocated 10,000 bytes at most, and the plain path 100,000."""
    given = bench.problem(12, 5, 30, torch.float32, "cpu")
    ours, plain = (bench.gradients(name, given) for name in ("chunked", "cross_entropy"))
    for a, b in zip(ours, plain):
        assert torch.allclose(a, b, atol=1e-6)
    peaks = iter([10_000, 100_000])
    monkeypatch.setattr(bench, "problem", lambda *shape: given)
    monkeypatch.setattr(bench.triton.testing, "do_bench", lambda call, **options: call() and 2.0)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    found = bench.losses(12, 5, 30)
    made = 4 * 5 * (12 + 30)
    sums = 4 * 5 * (30 + int(given[3].sum()))
    assert found["chunked"]["bytes"] == 10_000 - made - sums
    assert found["cross_entropy"]["bytes"] == 100_000 - made
    assert found["memory_share"] == (10_000 - made - sums) / (100_000 - made)
    assert found["times_faster"] == 1
