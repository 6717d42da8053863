"""The borders of a token space, of canvases and of rows."""

from __future__ import annotations

import pytest
import torch

from mdiff.errors import ConfigError, DataError
from mdiff.tokens import TokenSpace, check_documents, continued, hidden_canvas, ranks, stack

SPACE = TokenSpace(4, mask_id=4)
# Two positions of ids 0 and 1, then one of ids 2 and 3.
PARTED = TokenSpace(4, mask_id=4, parts=((2, 0, 2), (1, 2, 4)))


@pytest.mark.parametrize("mask_id", [0, 3, 4])
def test_a_mask_may_be_any_id_or_the_one_after_all(mask_id):
    space = TokenSpace(4, mask_id=mask_id)
    assert space.forbidden == ((mask_id,) if mask_id < 4 else ())
    assert space.permitted == 4 - len(space.forbidden)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": 5}, "mask_id=5: expected 0 to 4"),
        ({"mask_id": -1}, "mask_id=-1: expected 0 to 4"),
        ({"mask_id": True}, "expected a whole number"),
        ({"mask_id": 4, "never": (4,)}, "expected ids below 4"),
        ({"mask_id": 4, "never": (-1,)}, "expected ids below 4"),
        ({"mask_id": 4, "never": (0, 1, 2, 3)}, "no id is left"),
        ({"mask_id": 0, "never": (1, 2, 3)}, "no id is left"),
        ({"mask_id": 4, "parts": ((0, 0, 2),)}, "positions >= 1"),
        ({"mask_id": 4, "parts": ((1, 2, 2),)}, "first < stop"),
        ({"mask_id": 4, "parts": ((1, 2, 5),)}, "stop <= 4"),
        # The mask alone, an id that is never generated alone, and both.
        ({"mask_id": 0, "parts": ((1, 0, 1), (1, 1, 4))}, r"\(1, 0, 1\) permits no id"),
        ({"mask_id": 4, "never": (1,), "parts": ((1, 1, 2),)}, "permits no id"),
        ({"mask_id": 0, "never": (1,), "parts": ((1, 0, 2),)}, "permits no id"),
    ],
)
def test_a_space_that_generates_nothing_or_has_no_such_ids_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenSpace(4, **options)


@pytest.mark.parametrize("row", [[0, 1, 2], [1, 0, 3], [4, 1, 4], [4, 4, 4]])
def test_a_part_holds_its_ids_and_the_mask(row):
    PARTED.check(torch.tensor([row]))


@pytest.mark.parametrize(("row", "position"), [([2, 0, 2], 0), ([0, 2, 2], 1), ([0, 1, 1], 2)])
def test_an_id_of_another_part_is_refused_with_its_position(row, position):
    with pytest.raises(DataError, match=f"token {row[position]} at position {position}: this part"):
        PARTED.check(torch.tensor([row]))
    valid = torch.ones(1, 3, dtype=torch.bool)
    valid[0, position] = False
    PARTED.check(torch.tensor([row]), valid)


@pytest.mark.parametrize("length", [2, 4])
def test_parts_that_do_not_sum_to_a_canvas_are_refused(length):
    with pytest.raises(DataError, match="sum to 3"):
        PARTED.check(torch.full((1, length), 4))


@pytest.mark.parametrize(
    ("given", "length", "error"),
    [([4, 1], 3, DataError), ([1, 4], None, DataError), ([0, 1, 2], 2, DataError),
     ([], 0, ConfigError)],
)  # fmt: skip
def test_given_tokens_with_a_mask_or_too_many_are_refused(given, length, error):
    with pytest.raises(error):
        continued(given, length, mask_id=4)


@pytest.mark.parametrize(("length", "found"), [(None, [0, 1]), (2, [0, 1]), (3, [0, 1, 4])])
def test_given_tokens_that_fill_a_canvas_need_no_mask(length, found):
    assert continued([0, 1], length, mask_id=4) == found


def test_the_first_document_that_holds_a_mask_or_no_id_is_named_with_its_position():
    check_documents([[0, 3], [], [1]], SPACE)
    for ids, at in (([0, 4], 1), ([-1], 0), ([0, 1, 5], 2)):
        with pytest.raises(DataError, match=f"document 2, position {at}"):
            check_documents([[0], ids], SPACE)


def test_the_rank_of_a_token_counts_the_valid_ones_before_it():
    valid = torch.tensor([[False, True, False, True], [True, True, False, False]])
    assert ranks(torch.zeros(2, 4), valid).tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert ranks(torch.zeros(1, 3), None).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("rows", [[], [[]], [[1], []]])
def test_a_batch_without_a_row_or_with_an_empty_one_is_refused(rows):
    with pytest.raises(ConfigError, match="empty canvas"):
        stack(rows, space=SPACE)


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)])
def test_a_canvas_has_a_row_and_a_position(shape):
    assert hidden_canvas(1, 1, space=SPACE).tolist() == [[4]]
    with pytest.raises(ConfigError, match="at least 1 of each"):
        hidden_canvas(*shape, space=SPACE)
