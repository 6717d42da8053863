"""Speculative within parts, guidance, a negative prompt and blocks: the tokens of `any_order`."""

from __future__ import annotations

import pytest
import torch
from folders import GOLDEN
from speculative_runs import Timed, both, ragged
from toys import HashDenoiser

import mdiff
from mdiff.denoiser import guided
from mdiff.denoiser.negative_condition import negative_prompt
from mdiff.sampling import sample
from mdiff.tokens import TokenSpace


def test_canvases_of_parts_are_drawn_within_their_parts():
    space = TokenSpace(11, mask_id=11, never=(3,), parts=((4, 2, 6), (3, 7, 11)))
    canvas = torch.full((6, 7), 11)
    both(HashDenoiser(space), canvas, space=space, drafts=3, order="random", seed=4)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_is_that_of_each_canvas(schedule):
    space = TokenSpace(5, mask_id=5)
    pair = guided(
        HashDenoiser(space), guidance_scale=2.0, without={"label": torch.tensor([0])}, space=space,
        guidance_schedule=schedule,
    )  # fmt: skip
    canvas, rest = ragged(space, 6, 7)
    _, found = both(pair, canvas, space=space, drafts=3, branches=2, seed=2, **rest)
    # Two branches a canvas, but where the scale is 1.
    assert int(found.calls.sum()) > int(found.rounds.sum())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_negative_prompt_is_bound_to_each_canvas(rows):
    space = TokenSpace(5, mask_id=5)
    canvas = torch.full((rows, 9), 5)
    for row in range(rows):
        canvas[row, : row + 1] = row % 5
    bind = negative_prompt(
        HashDenoiser(space), torch.tensor([3, 1]), space=space, guidance_scale=2.5
    )
    both(bind(canvas, None), canvas, space=space, drafts=2, branches=2, seed=2)


@pytest.mark.parametrize("block_length", [1, 3, 4])
@pytest.mark.parametrize("context", [None, 5])
def test_blocks_run_it_in_each_block(block_length, context):
    space = TokenSpace(4, mask_id=4)
    canvas, rest = ragged(space, 6, 10)
    both(
        Timed(space), canvas, space=space, drafts=2, order="random", seed=4, context=context,
        block_length=block_length, **rest,
    )  # fmt: skip


def test_a_block_model_keeps_its_finished_blocks_once_for_all_canvases():
    model = mdiff.load(str(GOLDEN / "llada2_moe"), mask_id=62, block_length=4, device="cpu")
    space, shown = TokenSpace(64, mask_id=62), []
    canvas = torch.randint(0, 60, (3, 16), generator=torch.Generator().manual_seed(1))
    canvas[:, 2:] = 62
    canvas[:, 9] = 7
    model.denoiser.trunk()[0].register_forward_pre_hook(lambda _, call: shown.append(call[0].shape))
    options = {"order": "random", "seed": 5, "temperature": 0.7}
    expected = sample(model.denoiser, canvas, space=space, sampler="any_order", **options)
    for accept in ("ratio", "coupled"):
        shown.clear()
        run = sample(model.denoiser, canvas, space=space, sampler="speculative", drafts=3,
                     accept=accept, **options)  # fmt: skip
        assert {shape[1] for shape in shown} == {4}
        # Three finished blocks cost one pass of the batch each; all other rows are canvases.
        assert sum(shape[0] for shape in shown) == 3 * 3 + int(run.calls.sum())
        assert int(run.rounds.sum()) < int(expected.rounds.sum())
        assert torch.equal(run.tokens[:, :2], canvas[:, :2])
        assert not (run.tokens == 62).any()
    assert torch.equal(run.tokens, expected.tokens)
    torch.testing.assert_close(run.log_prob, expected.log_prob, atol=1e-4, rtol=0)
