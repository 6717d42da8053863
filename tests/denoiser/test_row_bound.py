"""Denoisers that hold something of each row of a batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from toys import HashDenoiser

from mdiff.denoiser import BlockWindow, RowBound, guided
from mdiff.errors import ConfigError
from mdiff.sampling import sample
from mdiff.schedule import Linear
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(29, mask_id=29)


class Labelled:
    """A toy that holds the label of each row instead of reading it from `cond`."""

    uses_time = False

    def __init__(self, model, label, bound):
        self.model, self.label, self.bound = model, label, bound

    def for_rows(self, index):
        self.bound.append(index.tolist())
        return Labelled(self.model, self.label[index], self.bound)

    def __call__(self, tokens, *, at=None, valid=None, **rest):
        return self.model(tokens, at=at, valid=valid, cond={"label": self.label})


def canvas():
    tokens = torch.full((3, 6), SPACE.mask_id)
    tokens[0, :4], tokens[1, :2] = 7, 5
    return tokens


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral", "confidence", "blocks"])
def test_rows_are_bound_once_for_each_set_of_active_rows(sampler):
    label, bound = torch.tensor([1, 2, 3]), []
    options = {"space": SPACE, "sampler": sampler, "seed": 4}
    model = HashDenoiser(SPACE)
    held = sample(Labelled(model, label, bound), canvas(), **options)
    given = sample(model, canvas(), cond={"label": label}, **options)
    assert torch.equal(held.tokens, given.tokens)
    assert torch.equal(held.calls, given.calls)
    if sampler == "first_hitting":
        # Two calls with all rows, two without the first, two of the last alone.
        assert bound == [[1, 2], [2]]
    assert all(now != before for before, now in pairwise(bound))


def test_a_block_window_gives_the_rows_of_its_block_of_the_canvas():
    model, tokens = HashDenoiser(SPACE), canvas()
    columns = torch.tensor([[4, 5], [2, 3], [0, 1]])
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    window = BlockWindow(
        model, tokens, columns, attended=everywhere, writable=everywhere, schedule=Linear(),
        mask_id=SPACE.mask_id,
    )  # fmt: skip
    block = torch.tensor([[3, 4], [29, 6], [1, 29]])
    whole = model(tokens.scatter(1, columns, block))
    expected = torch.stack([whole[row, columns[row]] for row in range(3)])
    assert torch.equal(window(block), expected)
    at = block == SPACE.mask_id
    assert torch.equal(window(block, at=at), expected[at])
    some = torch.tensor([2, 1])
    assert torch.equal(window.for_rows(some)(block[some]), expected[some])
    with pytest.raises(ConfigError, match="2 rows: this denoiser is bound to 3"):
        window(block[:2])


def test_guidance_goes_inside_a_denoiser_that_is_bound_to_rows():
    bound = Labelled(HashDenoiser(SPACE), torch.tensor([1]), [])
    assert isinstance(bound, RowBound)
    with pytest.raises(ConfigError, match="bound to rows"):
        guided(bound, guidance_scale=2.0, hide="given", space=SPACE)
