"""sample: figures, seeds, and options by name, on toys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toys import make_toy

import mdiff
from mdiff.errors import ConfigError, MdiffError
from mdiff.find import find
from mdiff.samplers.first_hitting import first_hitting
from mdiff.sampling import plain_seed, row_seeds, streams
from mdiff.schedule import Cosine
from mdiff.tokens import hidden_canvas

TOY = make_toy()


def toy_canvas(rows: int) -> torch.Tensor:
    return hidden_canvas(rows, TOY.length, space=TOY.space)


def test_the_figures_of_a_sample_are_those_of_its_draws() -> None:
    drawn = mdiff.sample(TOY.denoiser(), toy_canvas(50), space=TOY.space, seed=3)
    assert drawn.calls.tolist() == [TOY.length] * 50
    # One reveal a call from the ideal denoiser: the chain rule gives the joint itself.
    joint = TOY.joint[tuple(drawn.tokens.T)]
    assert torch.allclose(drawn.log_prob, joint.log())
    assert bool((drawn.entropy > 0).all())
    assert bool((drawn.entropy < math.log(TOY.vocab)).all())


def test_a_canvas_without_masks_comes_back_unchanged() -> None:
    canvas = torch.tensor([[0, 1, 2, 3]])
    drawn = mdiff.sample(TOY.denoiser(), canvas, space=TOY.space)
    assert torch.equal(drawn.tokens, canvas)
    assert drawn.calls.tolist() == [0]
    assert drawn.log_prob.tolist() == drawn.entropy.tolist() == [0.0]


def test_row_seeds_make_each_row_the_same_alone() -> None:
    seeds = torch.tensor([5, 9, 5])
    together = mdiff.sample(TOY.denoiser(), toy_canvas(3), space=TOY.space, seed=seeds)
    for row in range(3):
        alone = mdiff.sample(
            TOY.denoiser(), toy_canvas(1), space=TOY.space, seed=seeds[row : row + 1]
        )
        assert torch.equal(alone.tokens[0], together.tokens[row])
    assert torch.equal(together.tokens[0], together.tokens[2])


def test_generators_only_yield_seeds() -> None:
    def once(seed: Any) -> torch.Tensor:
        return mdiff.sample(TOY.denoiser(), toy_canvas(2), space=TOY.space, seed=seed).tokens

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(once(generator(4)), once(generator(4)))
    pair = [generator(4), generator(8)]
    first = once(pair)
    assert torch.equal(first[0], once([generator(4), generator(1)])[0])
    assert plain_seed(pair, 2).tolist() != plain_seed(pair, 2).tolist()
    with pytest.raises(ConfigError, match="one a row"):
        once([generator(4)])
    with pytest.raises(ConfigError, match="expected an int"):
        once("7")


def test_a_denoiser_that_gives_nan_is_named() -> None:
    broken = mdiff.from_logits(lambda tokens: torch.full((*tokens.shape, 4), torch.nan))
    with pytest.raises(MdiffError, match=r"NaN or infinite logits for samples \[0, 1\]"):
        mdiff.sample(broken, toy_canvas(2), space=TOY.space)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "frist_hitting"}, "did you mean 'first_hitting'"),
        ({"per_cal": 2}, "did you mean 'per_call'"),
        ({"per_call": "2"}, "per_call='2': expected int"),
        ({"per_call": True}, "per_call=True: expected int"),
        ({"temperature": None}, "temperature=None: expected float"),
        ({"schedule": "cosinus"}, "did you mean 'cosine'"),
        ({"sampler": "blocks", "inner": "ancestrl"}, "did you mean 'ancestral'"),
        ({"sampler": "blocks", "stepz": 3}, "did you mean 'steps'"),
        ({"sampler": "any_order", "order": [0, "x"]}, "expected whole numbers"),
    ],
)
def test_options_that_a_sampler_does_not_take_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mdiff.sample(TOY.denoiser(), toy_canvas(1), space=TOY.space, **options)


def test_names_and_lists_become_objects_at_the_surface() -> None:
    def tokens(**options: Any) -> torch.Tensor:
        return mdiff.sample(TOY.denoiser(), toy_canvas(8), space=TOY.space, **options).tokens

    assert torch.equal(
        tokens(sampler="ancestral", schedule="cosine", steps=2),
        tokens(sampler="ancestral", schedule=Cosine(), steps=2),
    )
    assert torch.equal(
        tokens(sampler="any-order", order=[3, 2, 1, 0]),
        tokens(sampler="any_order", order="right_to_left"),
    )
    tokens(sampler="blocks", inner="any_order", order="right_to_left", block_length=2)


def test_seeds_of_rows_are_the_seed_then_others() -> None:
    seeds = row_seeds(7, 100).tolist()
    assert seeds[0] == 7
    assert len(set(seeds)) == 100
    assert row_seeds(7, 3).tolist() == seeds[:3]


@pytest.mark.parametrize(
    ("seed", "held"),
    [(-1, -1), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1), (2**64 + 5, 5)],
)
def test_a_seed_counts_modulo_2_to_the_64(seed: int, held: int) -> None:
    assert streams(seed, 2, torch.device("cpu"))[0].tolist() == [held, held]
    assert int(row_seeds(seed, 2)[0]) == held


@pytest.mark.parametrize("sampler", ["any_order", "confidence", "halton"])
def test_a_canvas_with_one_hidden_position_starts_at_time_1(sampler: str) -> None:
    canvas = toy_canvas(1)
    canvas[0, 1:] = 0
    (state,) = find("samplers", sampler)(TOY.denoiser(), canvas, space=TOY.space)
    assert state.t.tolist() == pytest.approx([1.0])


def test_each_block_has_a_seed_of_its_own() -> None:
    seeds: list[int] = []

    def inner(denoiser: Any, canvas: torch.Tensor, **options: Any) -> Any:
        seeds.append(int(torch.as_tensor(options["seed"]).flatten()[0]))
        return first_hitting(denoiser, canvas, **options)

    options = {"inner": inner, "block_length": 1}
    mdiff.sample(TOY.denoiser(), toy_canvas(1), space=TOY.space, sampler="blocks", **options)
    assert len(seeds) == len(set(seeds)) == TOY.length


@pytest.mark.parametrize("options", [
    {}, {"sampler": "any_order", "order": "random"}, {"sampler": "confidence"},
    {"sampler": "halton", "grid": (1, TOY.length)}, {"block_length": 2},
])  # fmt: skip
def test_the_tokens_log_probabilities_sum_to_the_samples(options: dict[str, Any]) -> None:
    canvas = toy_canvas(20)
    canvas[::2, 1] = 0
    drawn = mdiff.sample(TOY.denoiser(), canvas, space=TOY.space, seed=3, **options)
    writing = drawn.writing
    assert torch.allclose(writing.log_prob.double().sum(1), drawn.log_prob, atol=1e-5)
    assert torch.equal(writing.times, (canvas == TOY.space.mask_id).long())
    number = writing.times.sum(1)
    assert torch.allclose(writing.entropy.double().sum(1) / number, drawn.entropy, atol=1e-5)
    for row in range(len(canvas)):
        # One a step, in some order; what is given has none.
        steps = writing.step[row][writing.times[row] > 0].tolist()
        assert sorted(steps) == list(range(1, int(number[row]) + 1))
    of_row = writing.of_row(1, torch.ones_like(canvas, dtype=torch.bool))
    assert [list(field) for field in of_row] == [
        field[1].tolist() for field in
        (writing.step, writing.log_prob, writing.entropy, writing.margin, writing.times)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["remdm", "gibbs", "edit", "path_planning", "ancestral"])
def test_what_is_known_of_a_writing_does_not_depend_on_the_batch(name: str) -> None:
    canvas = toy_canvas(6)
    for row in range(len(canvas)):
        canvas[row, : row % TOY.length] = 1
    seeds = torch.arange(6)
    options: dict[str, Any] = {"sampler": name, "space": TOY.space}
    options |= {"edit_threshold": 0.1} if name == "edit" else {}
    together = mdiff.sample(TOY.denoiser(), canvas, seed=seeds, **options).writing
    for row in range(len(canvas)):
        alone = mdiff.sample(
            TOY.denoiser(), canvas[row : row + 1], seed=seeds[row : row + 1], **options
        ).writing
        assert together.of_row(row) == alone.of_row(0)
