"""The figures that README and docs/figures.md quote are those of the recorded results."""

from __future__ import annotations

import json
import re

import pytest
from folders import ROOT

from mdiff.find import names

RESULTS = ROOT / "benchmarks" / "results"
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/figures.md")}


def result(name: str) -> dict:
    """The document that a benchmark wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def figures(name: str) -> dict:
    """Its figures."""
    return result(name)["figures"]


def bench(*words: str) -> float:
    """The figure of the only row of `mdiff bench` whose description holds these words."""
    (found,) = [r for r in result("bench")["rows"] if all(word in r["what"] for word in words)]
    return found["figure"]


def rows(page: str) -> dict[str, str]:
    """The second column of each row of a page's tables, by the first."""
    found = {}
    for line in PAGES[page].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) >= 2 and not set(cells[0]) <= set("-"):
            found[cells[0]] = cells[1]
    return found


def numbers(text: str) -> list[float]:
    """The numbers of a cell, in order."""
    return [float(found.replace(",", "")) for found in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def row_that_begins(page: str, start: str) -> list[float]:
    """The numbers of the only row whose first cell begins so."""
    (cell,) = [value for key, value in rows(page).items() if key.startswith(start)]
    return numbers(cell)


@pytest.mark.parametrize("page", PAGES)
def test_the_bound_of_the_text_model_is_the_recorded_one(page):
    found = row_that_begins(page, "`builtin:shakespeare`, held-out tenth")
    bound = figures("bound")
    assert found[:2] == [round(bound["bits_per_char"], 3), round(bound["bits_per_char_stderr"], 3)]


def test_the_baselines_of_text_are_the_recorded_ones():
    page = "docs/figures.md"
    assert row_that_begins(page, "autoregressive, same size") == [
        round(figures("autoregressive")["held_out_bits_per_char"], 3)
    ]
    assert row_that_begins(page, "... for all of the masked model's 4,200 steps") == [
        round(figures("autoregressive_full")["held_out_bits_per_char"], 3)
    ]
    ngrams = figures("ngrams")["bits_per_char"]
    assert row_that_begins(page, "Kneser-Ney") == [
        round(ngrams[f"{n}-gram"], 3) for n in (4, 5, 6, 7)
    ]
    assert "(n-grams of 7 characters: 2.188)" in PAGES["README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_ratios_of_the_bench_are_the_recorded_ones(page):
    draws = [
        round(bench("draw by c", "50,257", name)) for name in ("MDLM", "LLaDA", "AmusedScheduler.")
    ]
    assert row_that_begins(page, "draw in C")[:3] == draws
    steps = [round(bench("generation", name)) for name in ("float64", "float32")]
    start = "a generation of 256" if page != "README.md" else "generation of 256"
    assert row_that_begins(page, start) == steps


def test_the_other_ratios_are_the_recorded_ones():
    page = "docs/figures.md"
    loss = [round(bench("loss", name), 1) for name in ("time against", "peak memory")]
    assert row_that_begins(page, "loss, forward and backward") == loss
    share = bench("outside the model", "share of a step")
    assert row_that_begins(page, "time outside the model") == [round(share, 1)]
    peak = figures("loader")["ways"]["ours"]["peak_over_files"]
    assert row_that_begins(page, "loading a checkpoint") == [round(peak, 3)]
    first = figures("samplers")
    assert row_that_begins(page, "first hitting against")[0] == round(first["ratio_every_step"], 1)


def test_the_figures_of_images_are_the_recorded_ones():
    page = "docs/figures.md"
    digits = figures("digits")
    assert row_that_begins(page, "digits recipe")[:3] == [
        round(digits["bits_per_dim"], 3), round(digits["marginal_bits_per_dim"], 3),
        round(digits["seconds_to_bound"]),
    ]  # fmt: skip
    assert row_that_begins(page, "... and samples whose requested digit")[:3] == [
        round(100 * digits["asked_label_by_3nn"], 1),
        round(100 * digits["real_label_by_3nn"], 1),
        round(digits["seconds"]),
    ]
    card = figures("fashion_card")
    (sixteen,) = [row for row in card["rows"] if row.get("steps", row.get("calls")) == 16]
    for name in PAGES:
        found = [v for k, v in rows(name).items() if k.startswith("`builtin:fashion`")]
        assert numbers(found[0])[0] == round(100 * sixteen["label"], 1)
    naming = figures("naming")
    assert row_that_begins(page, "`builtin:emoji`, 120 held-out pictures")[:2] == [
        100 * naming["top_5_of_20"], 100 * naming["top_1_of_20"],
    ]  # fmt: skip
    samplers = figures("inpainting")["samplers"].values()
    assert row_that_begins(page, "given tokens changed") == [
        sum(one["given tokens changed"] for one in samplers)
    ]


def test_every_figure_names_a_command_that_exists():
    for cells in re.findall(r"`python ((?:benchmarks|examples)/\w+\.py)", PAGES["docs/figures.md"]):
        assert (ROOT / cells).is_file(), cells
    for line in PAGES["docs/figures.md"].splitlines():
        if line.startswith("| ") and not line.startswith("| what"):
            assert re.search(r"`[^`]+`[^|]*\|$|the same \|$", line), line


def test_readme_is_short_and_claims_no_more_than_the_figures_page():
    assert len(PAGES["README.md"].splitlines()) <= 150
    known = {number for cell in rows("docs/figures.md").values() for number in numbers(cell)}
    section = PAGES["README.md"].partition("## Six figures")[2].partition("## The tree")[0]
    quoted = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(quoted) == 6
    for line in quoted:
        value = line.strip("|").split("|")[1]
        assert set(numbers(re.sub(r"\(.*?\)", "", value))) <= known, line


SAMPLERS_PAGE = (ROOT / "docs" / "samplers.md").read_text()


def table_after(heading: str) -> list[list[str]]:
    """The cells of the rows of the first table of docs/samplers.md whose head begins so."""
    table = SAMPLERS_PAGE.partition(f"\n| {heading}")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_every_sampler_has_its_row_and_its_measured_distance_from_the_joint():
    cells = {row[0].strip("`"): row for row in table_after("name | where")[2:]}
    assert sorted(cells) == names("samplers")
    recorded = figures("taking_back_toy")
    defaults = {row["sampler"]: row for row in recorded["rows"] if not row["options"]}
    for name, row in cells.items():
        assert len(row) == 8, name
        assert all(row), name
        own = defaults.get(name, {"figures": {}})
        # One that was added since, or cannot run on the toy, is shown as not measured.
        found = f"{own['figures']['tv'][0]:.3f} at {own['calls']:.1f}" if own["figures"] else "-"
        assert row[7] == found, name
    assert f"{recorded['floor']:.3f}" in SAMPLERS_PAGE


@pytest.mark.parametrize(
    ("medium", "heading", "first", "share"),
    [
        ("text", "n-gram, bits a character", "ngram", "distinct"),
        ("pictures", "Frechet distance", "frechet", "empty"),
    ],
)
def test_the_comparison_of_samplers_is_the_recorded_one(medium, heading, first, share):
    head, _, *table = table_after(heading)
    quoted = {}
    for series, *cells in table:
        for calls, cell in zip(head[-len(cells) :], cells):
            quoted[series.replace("`", ""), int(calls)] = cell
    recorded = figures(f"taking_back_{medium}")
    assert len(quoted) == len(recorded["rows"])
    for row in recorded["rows"]:
        cell, own = quoted[row["series"], row["asked_calls"]], row["figures"]
        value, error = own[first]["value"], own[first]["stderr"]
        start = f"{value:.2f} ± {error:.2f}, {100 * own[share]['value']:.0f} %"
        assert cell.startswith(start), row["series"]
        if abs(row["calls"] - row["asked_calls"]) >= 0.5:
            assert f"({row['calls']:.1f} calls)" in cell, row["series"]
    data = recorded["data"][first]
    assert f"{data['value']:.2f} ± {data['stderr']:.2f}" in SAMPLERS_PAGE


def test_rounds_and_times_of_speculative_are_the_recorded_ones():
    recorded = {}
    for row in figures("speculative")["rows"]:
        if row["sampler"] == "speculative":
            key = row["model"], row["order"], row["temperature"], row["accept"], row["drafts"]
            recorded[key] = f"{row['rounds_a_token']:.2f} ({row['ratio']:.2f})"
    _, _, *lines = table_after("rounds a token (time")
    assert len(lines) == 8
    for first, *cells in lines:
        model, order, temperature = first.split(", ")
        degree = float(temperature.removeprefix("temperature "))
        accept = "ratio" if degree else "coupled"
        key = model.strip("`"), order, degree, accept
        assert cells == [recorded[(*key, drafts)] for drafts in (2, 4, 8)], first
