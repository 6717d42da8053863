"""The law that the Triton draw has by its own arithmetic, in its interpreter, beside float64."""

from __future__ import annotations

import math

import pytest
import torch
from exactness import TAIL, TOTAL_VARIATION, distributions, figures_agree, total_variation
from interpreted import interpreter  # noqa: F401 (a fixture that pytest finds by name)
from test_draw_triton import counters

from mdiff.kernels import draw_triton as module
from mdiff.kernels.draw_triton import draw_triton
from mdiff.kernels.reference import TILE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def law(logits, monkeypatch):
    """The draws and the probabilities that a row's tiles and the ids in them are taken with.

    A tile is taken with its share of the masses that READ writes, an id in it with its share of
    the weights that the inverse CDF runs over.
    """
    from tile_weights import weights_kernel

    made, empty = [], torch.empty
    monkeypatch.setattr(module, "PROGRAMS", 1)
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1]
    )  # fmt: skip
    drawn = draw_triton(logits[None], **counters(1))
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    peak, mass, _ = next(each for each in made if each.dim() == 3)[:, 0].double()
    share = mass * (peak - peak.max()).exp()
    weights = torch.empty(len(logits), dtype=torch.float64)
    weights_kernel[(len(mass),)](logits, weights, len(logits), math.log2(math.e), TILE=TILE)
    inside = torch.nn.functional.pad(weights, (0, len(mass) * TILE - len(weights)))
    inside = inside.view(len(mass), TILE)
    p = (share / share.sum())[:, None] * inside / inside.sum(1, keepdim=True)
    return drawn, p.flatten()[: len(logits)]


@pytest.mark.parametrize("name", distributions(2))
def test_the_law_and_the_figures_are_those_of_float64(name, monkeypatch):
    logits = distributions()[name]
    drawn, p = law(logits, monkeypatch)
    assert total_variation(p, logits) < TOTAL_VARIATION
    figures_agree(drawn, logits[None])
    if name == "two levels":
        tail = TAIL * (len(logits) - 1)
        assert abs(float(p[1:].sum()) / tail - 1) < TOTAL_VARIATION
        assert float(p[1:].min()) > 0.99 * TAIL
