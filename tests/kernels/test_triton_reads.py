"""How much of a row the Triton draw reads, counted in Triton's interpreter."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from interpreted import interpreter  # noqa: F401 (a fixture that pytest finds by name)
from test_draw_triton import agree, both, normal
from triton.runtime.interpreter import InterpreterBuilder

from mdiff.kernels import draw_triton as module

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def laws(vocab):
    """Rows of many shapes: broad, flat, falling, peaked, of two levels, and a long slope."""
    noise, column = normal(1, vocab, seed=2)[0], torch.arange(vocab)
    return torch.stack([
        noise, noise / 3, noise / 30, 0 * noise, -(column + 1.0).log(), noise + 30 * (column == 17),
        5.0 * (column % 97 == 5), torch.linspace(-300, 300, vocab), noise.bfloat16().float(),
    ])  # fmt: skip


@pytest.fixture
def reads(monkeypatch):
    """A count of the elements of a tensor that kernels load, by their addresses."""
    counted = []

    def load(builder, pointers, mask, *others):
        addresses = numpy.asarray(pointers.data)
        there = numpy.broadcast_to(mask.data, addresses.shape)
        counted.append(addresses[there])
        return original(builder, pointers, mask, *others)

    original = InterpreterBuilder.create_masked_load
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", load)

    def of(table):
        begin = table.data_ptr()
        return sum(int(((a >= begin) & (a < begin + table.nbytes)).sum()) for a in counted)

    return of


@pytest.mark.parametrize(
    "options",
    [{}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 0.999, "min_p": 1e-4}, {"top_k": 8},
     {"min_p": 0.45}],
    ids=str,
)  # fmt: skip
def test_a_row_is_read_once_and_with_a_filter_what_reaches_its_bound_once_more(
    options, reads, monkeypatch
):
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(module, "QUEUE", 32)
    logits, tile = laws(2048), 128
    rows, vocab = logits.shape
    agree(*both(logits, tile=tile, measure="drawn", **options))
    found = torch.tensor([reads(row) for row in logits])
    # The tile of the maximum, the winner and, for top_p, a sample of some 3 percent.
    once = vocab + 2 * tile + (2 * module._sample(vocab) if "top_p" in options else 0)
    assert once < 1.16 * vocab
    piece = tile // module.PIECES
    maxima = logits.view(rows, -1, piece).amax(2)
    bound = {
        "top_k": maxima.sort(1, descending=True).values[:, options.get("top_k", 1) - 1],
        "min_p": logits.amax(1) + math.log(options.get("min_p", 1)),
    }
    if "top_p" in options:
        assert (found <= once + vocab).all()
        # A long slope has its edge in one tile.
        assert found[7] < once + 0.1 * vocab
    else:
        again = [piece * (maxima >= bound[name][:, None]).sum(1) for name in options]
        assert torch.equal(found, once + sum(again, torch.zeros(rows, dtype=torch.int64)))
