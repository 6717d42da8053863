"""The benchmark: the turns it takes, what it counts, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdiff.cli import run
from mdiff.cli.bench import NAMES
from mdiff.evaluation import bench
from mdiff.evaluation.bench.draw import gpu_rows
from mdiff.evaluation.bench.generation import (
    REVISING,
    Generation,
    expected_calls,
    generation_rows,
    overhead_row,
    revising_row,
)
from mdiff.evaluation.bench.laws import MDLM_FLOAT32, laws, sides
from mdiff.evaluation.bench.loss import PeakBytes, Problem, loss_rows
from mdiff.evaluation.bench.run import SECTIONS, Bench, one_thread
from mdiff.evaluation.bench.timing import (
    Row,
    Size,
    cpu_seconds,
    interleaved,
    last_cache_bytes,
    times_faster,
)

TINY = Size(
    rows=8, vocab=67, small=41, small_rows=8, repeats=2, loss_repeats=1, length=10, width=16,
    depth=1, steps=20, timed=4,
)  # fmt: skip


def quiet(_: str) -> None:
    """No progress."""


# generations


def test_expected_calls_are_the_mean_number_of_steps_that_are_hit() -> None:
    steps, length = 3, 2
    hit = [len({a, b}) for a in range(steps) for b in range(steps)]
    assert expected_calls(steps, length) == pytest.approx(sum(hit) / len(hit), abs=1e-12)


def test_our_calls_of_all_stretches_are_one_a_position() -> None:
    run = Generation(TINY)
    assert sum(run.our_calls(number) for number in range(TINY.timed)) == TINY.length


@pytest.mark.parametrize("full", [False, True])
def test_a_generation_says_what_it_ran_and_what_it_extrapolated(full: bool) -> None:
    size = Size(**{**vars(TINY), "full": full})
    found, _ = sides()
    rows = list(generation_rows(size, laws(found), quiet))
    assert [row.met is not None for row in rows] == [True, True]
    for row in rows:
        assert row.detail["extrapolated"] is not full
        assert row.detail["steps_timed"] == (size.steps if full else size.timed)
        assert row.detail["rows_drawn"] == (size.length, size.steps * size.length)
        assert min(row.detail["whole_seconds"]) > 0
        assert row.note == ""
    ancestral, cached = (row.detail["calls"][1] for row in rows)
    assert ancestral == size.steps
    assert 1 <= cached <= min(size.steps, size.length + 1)


def test_the_share_outside_the_model_is_a_share() -> None:
    row = overhead_row(TINY, quiet)
    assert row.figure is not None
    assert 0 < row.figure < 100
    assert row.unit == "%"
    assert not row.at_least


@pytest.mark.parametrize("name", REVISING)
def test_a_sampler_that_takes_back_has_a_share_beside_model_and_draw(name: str) -> None:
    row = revising_row(TINY, name, quiet)
    assert row.figure is not None
    assert -100 < row.figure < 100
    assert row.target == 2
    assert row.detail["outside_seconds"]
    assert min(row.detail["rows"]) > 0
    assert "% with the draw of" in row.note


def test_the_rows_of_a_gpu_compare_equal_numbers_of_rows() -> None:
    """On the CPU, by its clock: the laws, the sides and the rows, not the times."""
    rows = list(
        gpu_rows(TINY, quiet, device="cpu", ours="torch", vocab=67, seconds=cpu_seconds)
    )  # fmt: skip
    assert [row.target for row in rows] == [45, 40]
    assert [row.note for row in rows] == ["", ""]
    assert all(row.per_row == row.figure for row in rows)


def test_a_backend_that_is_missing_is_said_to_be() -> None:
    (row,) = gpu_rows(TINY, quiet, device="cpu", ours="tritan", vocab=67, seconds=cpu_seconds)
    assert row.figure is None
    assert "'tritan' is not here" in row.note


# the loss


def gathered(
    features: Tensor, head: torch.nn.Linear, targets: Tensor, *, rows: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract of the fused loss, the plain way."""
    nll = F.cross_entropy(head(features[rows]), targets[rows], reduction="none")
    return (nll * weights[rows]).sum(), nll.detach()


def test_the_loss_rows_compare_time_memory_and_gradients() -> None:
    gradients, memory, time = loss_rows(TINY, quiet, gathered)
    assert gradients.met
    # Half of the rows: less of the logits, their softmax and their gradient.
    assert 1 < (memory.figure or 0) < 2
    assert time.per_row == pytest.approx((time.figure or 0) / 2)


def test_a_loss_with_wrong_gradients_misses_its_target() -> None:
    def wrong(features: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        value, nll = gathered(features, *rest, **options)
        return value * (1 + 1e-4), nll

    gradients = next(loss_rows(TINY, quiet, wrong))
    assert gradients.figure == pytest.approx(1e-4, rel=1e-2)
    assert gradients.met is False


def test_peak_bytes_are_those_alive_at_once_and_not_those_known() -> None:
    known = torch.zeros(1000)
    with PeakBytes(known) as mode:
        a = known + 1
        b = a + 1
        view = b[10:]
        del a, b
        c = view.exp()
        known.mul_(2)
    # a and b whole, then b (through its view) and c.
    assert mode.peak == 4 * (1000 + 1000)
    assert c.shape == (990,)


def test_peak_bytes_see_the_backward() -> None:
    case = Problem(8, 16, 67)
    used = case.peak_bytes(case.plain)
    logits = 8 * 67 * 4
    # Logits, their log-softmax and its gradient, at least.
    assert 3 * logits <= used <= 5 * logits + case.head.weight.nbytes + case.features.nbytes


# timing and rows


def test_sides_are_warmed_up_and_run_in_turns() -> None:
    order: list[str] = []
    timings = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2,
        seconds=lambda task: (task(), float(len(order)))[1],
    )  # fmt: skip
    assert "".join(order) == "ab" + "abab"
    assert timings["a"] == [3, 5]
    assert timings["b"] == [4, 6]


def test_a_figure_is_of_the_minima_and_counts_the_rows_of_both_sides() -> None:
    row = times_faster("draw", "x", [1.0, 2.0, 9.0], [6.0, 5.0, 8.0], rows=(512, 1024), target=5)
    assert (row.figure, row.median, row.per_row, row.met) == (5.0, 3.0, 2.5, True)
    assert row.as_json()["met"] is True


def test_a_target_is_met_from_its_own_side_and_nothing_is_said_without_one() -> None:
    assert Row("s", "w", 2.0, target=3.0).met is False
    assert Row("s", "w", 2.0, target=3.0, at_least=False).met is True
    assert Row("s", "w", 2.0).met is None
    assert Row("s", "w", target=3.0).met is None


def test_the_last_cache_is_the_largest(tmp_path: Path) -> None:
    for index, size in enumerate(["32K", "1024K", "32M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_cache_bytes(tmp_path) == 32 * 2**20
    assert last_cache_bytes(tmp_path / "nowhere") is None


def test_threads_and_the_generator_are_given_back() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
            torch.rand(3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.rand(1), expected)


# the command


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK", TINY)


def test_the_names_of_the_command_are_those_of_the_sections() -> None:
    assert NAMES == SECTIONS


@pytest.mark.usefixtures("tiny")
def test_bench_prints_one_json_object_with_versions_laws_and_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    words = ["--quick", "--only", "overhead,draw", "--json", "--out", str(out)]
    assert run(["bench", *words]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert json.loads(out.read_text()) == report
    assert {"cpu", "threads", "python", "torch", "mdiff", "diffusers"} <= set(report["machine"])
    assert report["machine"]["threads"] == 1
    assert report["quick"] is True
    assert report["interrupted"] is False
    assert MDLM_FLOAT32 in {law["name"] for law in report["laws"]}
    assert all(law["passed"] for law in report["laws"])
    measured = [row for row in report["rows"] if row["figure"] is not None]
    assert [row["section"] for row in measured] == ["draw"] * (len(measured) - 7) + ["overhead"] * 7
    against = [row for row in measured if "against" in row["what"]]
    assert all(len(row["detail"]["other"]["seconds"]) == TINY.repeats for row in against)
    assert all(row["detail"]["mdiff"]["rows"] == TINY.rows // 2 for row in against)
    assert "draw, V = 67, 8 rows" in captured.err


@pytest.mark.usefixtures("tiny")
def test_the_table_has_the_target_beside_the_figure_and_says_that_it_is_quick(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["bench", "--quick", "--only", "overhead"]) == 0
    out = capsys.readouterr().out
    assert "too small for the targets" in out
    assert "outside the model, V = 67, L = 10" in out
    assert "<= 1.00 %" in out
    assert "law of" not in out


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_reports_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(self: Bench, sections: list[str]) -> Iterator[Row]:
        yield Row("overhead", "measured", 2.0, 2.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "rows", interrupted)
    out = tmp_path / "bench.json"
    assert run(["bench", "--quick", "--only", "overhead", "--json", "--out", str(out)]) == 130
    for report in (json.loads(capsys.readouterr().out), json.loads(out.read_text())):
        assert report["interrupted"] is True
        assert [row["what"] for row in report["rows"]] == ["measured"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "drow"], "did you mean 'draw'"),
        (["--only", ""], "known: draw"),
        (["--quick", "--full"], "give one of them"),
        (["--out", "nowhere/bench.json"], "there is no directory"),
        (["--quik"], "did you mean '--quick'"),
    ],
)
def test_options_that_make_no_sense_exit_with_2(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *words]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.out == ""
