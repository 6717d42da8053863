"""Samplers and their options one by one: counts, orders, blocks, thresholds."""

from __future__ import annotations

import math
import time

import pytest
import torch
from folders import ROOT
from sampler_runs import SPACE, finish, mixed_canvas
from toys import HashDenoiser

from mdiff import from_logits, sample
from mdiff.errors import ConfigError
from mdiff.find import find
from mdiff.samplers.amused import CosineInFloat32
from mdiff.samplers.confidence import confidence
from mdiff.sampling import reveal_counts, schedule_counts
from mdiff.schedule import Cosine, Linear
from mdiff.tokens import TokenSpace


def test_first_hitting_calls_exactly_the_hidden_count():
    canvas = mixed_canvas()
    hidden = (canvas == SPACE.mask_id).sum(1)
    assert finish("first_hitting", canvas)[-1].calls.tolist() == hidden.tolist()
    by_three = finish("first_hitting", canvas, per_call=3)[-1].calls
    assert by_three.tolist() == (-(-hidden // 3)).tolist()


def test_ancestral_calls_at_most_min_of_steps_and_hidden_and_idles_on_request():
    canvas = torch.full((8, 12), SPACE.mask_id)
    for steps in (1, 5, 300):
        assert (finish("ancestral", canvas, steps=steps)[-1].calls <= min(steps, 12)).all()
    every = finish("ancestral", canvas, steps=30, idle_calls=True)
    quiet = finish("ancestral", canvas, steps=30)
    assert (every[-1].calls > quiet[-1].calls).all()
    assert (every[-1].tokens == quiet[-1].tokens).all()


def test_counts_are_exact_for_every_sample():
    hidden = torch.tensor([0, 1, 5, 12])
    for counts in ("schedule", "even"):
        for steps in (1, 3, 12, 20):
            table = reveal_counts(counts, hidden, steps=steps, schedule=Cosine())
            assert table.sum(1).tolist() == hidden.tolist()
            assert (table >= 0).all()
    given = torch.tensor([[1, 2], [0, 3]])
    for table in (given, given[0]):
        kept = reveal_counts(table, torch.tensor([3, 3]), steps=None, schedule=Linear())
        assert torch.equal(kept, table.expand(2, 2))
    for wrong in (torch.tensor([1, 1]), torch.tensor([-1, 4]), torch.tensor([1.0, 2.0]), "odd"):
        with pytest.raises(ConfigError):
            reveal_counts(wrong, torch.tensor([3, 3]), steps=2, schedule=Linear())


def test_given_counts_are_obeyed_at_each_step():
    canvas = torch.full((2, 6), SPACE.mask_id)
    table = torch.tensor([[1, 5], [4, 2]])
    for name in ("confidence", "any_order"):
        found = [s.revealed.sum(1) for s in finish(name, canvas, counts=table)]
        assert torch.stack(found, 1).tolist() == table.tolist()


def test_a_users_permutation_is_the_order_of_reveal():
    order = torch.tensor([[2, 0, 1, 3], [3, 2, 1, 0]])
    states = finish("any_order", torch.full((2, 4), SPACE.mask_id), order=order)
    assert torch.stack([s.revealed.long().argmax(1) for s in states], 1).tolist() == order.tolist()


@pytest.mark.parametrize(
    "order",
    [
        "sideways",
        torch.tensor([0, 1, 2]),
        torch.tensor([0, 1, 2, 2]),
        torch.tensor([0.0, 1, 2, 3]),
        torch.tensor([1, 2, 3, 4]),
    ],
    ids=str,
)
def test_anything_but_a_permutation_is_refused(order):
    with pytest.raises(ConfigError):
        finish("any_order", torch.full((2, 4), SPACE.mask_id), order=order)


def test_confidence_keeps_the_positions_that_score_highest():
    canvas = torch.full((3, 6), SPACE.mask_id)
    for score in ("confidence", "entropy", "margin"):
        first = finish("confidence", canvas, score=score, steps=3, counts="even")[0]
        assert first.revealed.sum(1).tolist() == [2, 2, 2]
    greedy = finish("confidence", canvas, temperature=0, steps=6, counts="even")
    denoiser = HashDenoiser(SPACE)
    logits = denoiser(canvas)
    logits[..., list(SPACE.forbidden)] = -torch.inf
    surest = logits.log_softmax(2).amax(2)
    assert (greedy[0].revealed.long().argmax(1) == surest.argmax(1)).all()


def test_blocks_fill_in_turn_and_stop_at_the_end_of_the_text():
    canvas = torch.full((64, 12), SPACE.mask_id)
    canvas[:, :2] = 1
    written = torch.stack([s.revealed for s in finish("blocks", canvas, block_length=5)])
    when = written.long().argmax(0)[:, 2:]
    assert (when[:, :5].amax(1) < when[:, 5:].amin(1)).all()
    last = finish("blocks", canvas, block_length=5, stop=7)[-1]
    ended = (last.tokens[:, 2:7] == 7).any(1)
    assert ended.any()
    assert not ended.all()
    assert (last.tokens[ended, 7:] == 7).all()
    assert (last.calls[ended] == 5).all()
    assert (last.calls[~ended] == 10).all()


def test_blocks_with_a_context_show_the_model_only_that_many_positions():
    widths = []

    class Watched(HashDenoiser):
        def __call__(self, tokens, *, valid=None, **rest):
            widths.append(valid.sum(1))
            return super().__call__(tokens, valid=valid, **rest)

    canvas = torch.full((2, 20), SPACE.mask_id)
    finish("blocks", canvas, denoiser=Watched(SPACE), block_length=4, context=8)
    assert int(torch.stack(widths).max()) == 8
    assert int(widths[0][0]) == 4


@pytest.mark.parametrize(("name", "options"), [
    ("first_hitting", {"per_call": 0}),
    ("ancestral", {"steps": 0}),
    ("confidence", {"steps": 0}),
    ("confidence", {"score": "magrin"}),
    ("confidence", {"noise": -1.0}),
    ("confidence", {"steps": 3, "counts": "evne"}),
    ("blocks", {"block_length": 0}),
    ("blocks", {"block_length": 8, "context": 4}),
    ("blocks", {"stop": 11}),
    ("first_hitting", {"temperature": -1.0}),
    ("first_hitting", {"temperature": float("nan")}),
    ("first_hitting", {"top_k": 0}),
    ("first_hitting", {"top_p": 0.0}),
    ("first_hitting", {"min_p": 1.5}),
    ("first_hitting", {"seed": torch.tensor([1])}),
    ("first_hitting", {"cond": {"label": torch.tensor([1])}}),
])  # fmt: skip
def test_options_out_of_range_are_refused_before_any_call(name, options):
    denoiser = HashDenoiser(SPACE)
    with pytest.raises(ConfigError):
        finish(name, torch.full((2, 4), SPACE.mask_id), denoiser=denoiser, **options)
    assert denoiser.calls == 0


def test_confidence_after_guidance_counts_both_branches():
    from mdiff.denoiser import guided

    model = guided(HashDenoiser(SPACE), guidance_scale=2.0, without={"label": torch.tensor(0)})
    canvas = torch.full((2, 3), SPACE.mask_id)
    *_, last = confidence(model, canvas, space=SPACE, cond={"label": torch.tensor([1, 2])})
    assert last.calls.tolist() == [6, 6]


def test_schedule_counts_are_not_moved_by_rounding():
    """Products such as 0.29 * 100 fall just below the whole number that they mean."""
    for hidden, steps in ((10, 5), (100, 100), (20, 10), (7, 7)):
        table = reveal_counts("schedule", torch.tensor([hidden]), steps=steps, schedule=Linear())
        assert table[0].tolist() == [hidden // steps] * steps


def test_a_given_stop_id_does_not_end_a_sample():
    canvas = torch.tensor([[5, 5, 5, 7, 5, 5, 5, 5]])
    never_stops = TokenSpace(11, mask_id=5, never=(7,))
    last = finish("blocks", canvas, space=never_stops, block_length=4, stop=7)[-1]
    assert int(last.calls) == 7
    assert (last.tokens[0, 4:] != 7).all()


def test_blocks_give_a_model_that_uses_time_the_hidden_share_of_its_window():
    found = []

    class Timed(HashDenoiser):
        uses_time = True

        def __call__(self, tokens, *, t=None, valid=None, **rest):
            hidden = (tokens == SPACE.mask_id) & valid
            found.append((float(t), int(hidden.sum()), int(valid.sum())))
            return super().__call__(tokens, valid=valid, **rest)

    finish("blocks", torch.full((1, 8), 5), denoiser=Timed(SPACE), block_length=4)
    assert [share for share, _, _ in found] == [hidden / 8 for _, hidden, _ in found]
    found.clear()
    finish("blocks", torch.full((1, 8), 5), denoiser=Timed(SPACE), block_length=4, context=4)
    assert all(positions == 4 and share == hidden / 4 for share, hidden, positions in found)


def test_blocks_of_blocks_and_counts_of_another_shape_are_refused():
    canvas = torch.full((2, 4), 5)
    with pytest.raises(ConfigError, match="inner"):
        finish("blocks", canvas, inner=find("samplers", "blocks"))
    with pytest.raises(ConfigError, match=r"first_hitting.* takes no steps"):
        finish("blocks", canvas, steps=2)
    for counts in (torch.tensor(4), torch.ones(3, 4).long(), torch.ones(2, 1, 1).long()):
        with pytest.raises(ConfigError, match="counts"):
            finish("confidence", canvas, counts=counts)


def test_more_reveals_a_call_than_positions_is_all_at_once():
    assert finish("first_hitting", torch.full((2, 4), 5), per_call=10**9)[-1].calls.tolist() == [
        1,
        1,
    ]


@pytest.mark.parametrize("sampler", ["halton", "confidence", "any_order", "amused", "blocks"])
@pytest.mark.parametrize("steps", [10**6, 10**9, 2**63])
def test_steps_beyond_the_hidden_positions_end_at_once(sampler, steps):
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
    canvas = torch.full((2, 49), 5)
    canvas[1, 3:] = 1
    options = {"block_length": 7} if sampler == "blocks" else {}
    if sampler == "blocks":
        options["inner"] = "confidence"
    begun = time.process_time()
    made = sample(model, canvas, space=TokenSpace(5, mask_id=5), sampler=sampler, steps=steps,
                  **options)  # fmt: skip
    assert time.process_time() - begun < 4
    assert made.calls.tolist() == [49, 3]
    assert bool((made.tokens < 5).all())


def test_too_many_steps_of_time_are_refused_and_another_sampler_is_named():
    model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 5))
    for steps in (0, 2**21, 10**9):
        with pytest.raises(ConfigError, match="first_hitting"):
            sample(
                model, torch.full((1, 4), 5), space=TokenSpace(5, mask_id=5), sampler="ancestral",
                steps=steps,
            )  # fmt: skip


def test_the_page_on_samplers_says_where_float32_leaves_one_fewer():
    hidden = torch.tensor([256])
    left = [
        256 - int(schedule_counts(hidden, steps=12, schedule=each)[0, :8].sum())
        for each in (Cosine(), CosineInFloat32())
    ]
    assert left == [128, 127]
    page = (ROOT / "docs" / "samplers.md").read_text()
    assert "leave 127 after step 8" in page
    assert "`CosineInFloat32()`" in page


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_a_table_of_reveals_is_that_of_the_definition(schedule):
    """The definition step by step, over steps fewer and more than the hidden positions."""
    for hidden in (0, 1, 2, 7, 20):
        for steps in (1, 2, 5, 19, 20, 21, 50):
            left, expected = hidden, []
            for step in range(1, steps + 1):
                wanted = math.floor(hidden * float(schedule.mask_prob(1 - step / steps)) + 1e-9)
                stay = min(max(min(wanted, left - 1), 1), left) if step < steps else 0
                expected.append(left - stay)
                left = stay
            table = reveal_counts(
                "schedule", torch.tensor([hidden, 20]), steps=steps, schedule=schedule
            )
            assert table[0].tolist() == expected
