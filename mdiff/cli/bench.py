"""`mdiff bench`: times of draws, losses and generation on this machine, beside other code."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli.options import OneObject
from mdiff.cli.views.console import message, result, result_json, writable
from mdiff.cli.views.streams import unread
from mdiff.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mdiff.evaluation.bench import Law, Row, SamplerRow, Size

NAMES = ("draw", "loss", "generation", "overhead")
# Columns of what is measured, and of running text.
WIDTH, LINE = 86, 100
COLUMNS = f"{'sampler':<46} {'on':<20} {'calls':>7} {'rounds':>7} {'again':>7}  law    figures"


def bench(
    only: Annotated[str | None, f"Of {','.join(NAMES)}; several with commas."] = None,
    quick: Annotated[bool, "Under 20 s, on cases too small for the targets."] = False,
    full: Annotated[bool, "Every step of the generations: half an hour."] = False,
    samplers: Annotated[
        bool, "Quality against calls of every sampler instead, on a toy and the shipped models."
    ] = False,
    as_json: OneObject = False,
    out: Annotated[Path | None, "A JSON file to write as well."] = None,
) -> None:
    """Time the hot loops against public samplers and losses, on one thread."""
    sections = chosen(only)
    size = sized(quick=quick, full=full)
    if samplers and (full or only is not None):
        raise ConfigError("--samplers measures other things: give it without --only and --full")
    writable(out)
    report: dict[str, Any] = {"quick": quick, "full": full, "sections": sections}
    try:
        if samplers:
            report["sections"] = ["samplers"]
            compare_samplers(report, show=not as_json, keep=out is not None)
        else:
            measure(report, sections, size, show=not as_json, keep=out is not None)
    finally:
        # Also of a run that was interrupted: what was measured so far.
        if as_json:
            result_json(report)
        if out is not None:
            out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            message(f"wrote {out}")


def chosen(only: str | None) -> list[str]:
    """The sections to run; ConfigError for a name that is not one."""
    if only is None:
        return list(NAMES)
    asked = [name.strip() for name in only.split(",")]
    for name in asked:
        if name not in NAMES:
            raise ConfigError(f"--only {name!r}: {nearest(name, NAMES)}")
    return [name for name in NAMES if name in asked]


def sized(*, quick: bool, full: bool) -> Size:
    """The sizes to run at; ConfigError for both options."""
    if quick and full:
        raise ConfigError("--quick and --full: give one of them")
    from mdiff.evaluation.bench import DEFAULT, FULL, QUICK

    return QUICK if quick else FULL if full else DEFAULT


def measure(
    report: dict[str, Any], sections: list[str], size: Size, *, show: bool, keep: bool
) -> None:
    """Fill the report, and print what is known as soon as it is, where it is to be shown.

    Raises typer.Exit where stdout's reader has left, unless there is a file to keep.
    """
    from mdiff.evaluation.bench import Bench

    begun = time.perf_counter()
    run = Bench(size, say=message)
    report.update(run.environment(), interrupted=True, laws=[], rows=[])
    if show:
        heading(report)
    if "draw" in sections or "generation" in sections:
        for law in run.check():
            passed = {"name": law.name, "p_value": law.p_value, "given_kept": law.given_kept}
            report["laws"].append({**passed, "passed": law.passed})
            if show:
                result(law_line(law))
    if show:
        result(f"{'':<{WIDTH}} {'minimum':>9} {'median':>9} {'a row':>8} {'target':>11}")
    for row in run.rows(sections):
        report["rows"].append(row.as_json())
        if unread() and not keep:
            raise typer.Exit
        if show:
            result(line(row, judged=not report["quick"]))
    report["interrupted"] = False
    report["seconds"] = round(time.perf_counter() - begun, 1)
    if show:
        result(f"{report['seconds']} s")


def compare_samplers(report: dict[str, Any], *, show: bool, keep: bool) -> None:
    """Fill the report with a row for each setting of each sampler, and print it as `measure`."""
    from mdiff.evaluation.bench import Amount, machine, one_thread, sampler_rows, toy_floor

    begun = time.perf_counter()
    amount = Amount.quick() if report["quick"] else Amount()
    floor = toy_floor(amount.toy)
    report.update(
        machine=machine(), amount=asdict(amount), tv_of_the_joint=floor, interrupted=True, rows=[]
    )
    if show:
        result(f"tv: total variation from a toy's joint; samples of it have {floor:.4f}")
        result(COLUMNS)
    with one_thread():
        for row in sampler_rows(amount, message):
            report["rows"].append(row.as_json())
            if unread() and not keep:
                raise typer.Exit
            if show:
                result(sampler_line(row))
    report["interrupted"] = False
    report["seconds"] = round(time.perf_counter() - begun, 1)
    if show:
        result(f"{report['seconds']} s")


def sampler_line(row: SamplerRow) -> str:
    """One row: the sampler with its options, its cost, its law and its figures."""
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    name = f"{row.sampler}({options})"
    if row.calls is None:
        return f"{name:<46} {row.where:<20} {row.note}"
    cost = f"{row.calls:7.1f} {row.rounds:7.1f} {row.taken_back:7.1f}"
    figures = (f"{key} {value:.4f} +- {error:.4f}" for key, (value, error) in row.figures.items())
    return f"{name:<46} {row.where:<20} {cost}  {row.law:<5}  {', '.join(figures)}"


def heading(report: dict[str, Any]) -> None:
    """The machine and how it is measured."""
    on = report["machine"]
    shown = (f"{name} {on[name] or 'missing'}" for name in ("torch", "python", "diffusers"))
    result(f"mdiff {on['mdiff']}, {', '.join(shown)}; {on['cpu']}, {on['threads']} thread")
    if report["quick"]:
        result("quick: cases too small for the targets; run without --quick to judge by them")
    result(fill(report["method"], LINE))


def law_line(law: Law) -> str:
    """One side's law, and what failed."""
    word = "ok  " if law.passed else "FAIL"
    kept = "" if law.given_kept else ", changes given tokens"
    return f"{word} law of {law.name}: chi-square p = {law.p_value:.3g}{kept}"


def line(row: Row, *, judged: bool = True) -> str:
    """One row: the figure, of the medians, a row, the target and, if `judged`, whether met."""
    if row.figure is None:
        return f"{row.what}: {row.note}"
    sign = ">=" if row.at_least else "<="
    target = "" if row.target is None else f"{sign} {shown(row.target, row.unit)}"
    met = {True: "met", False: "MISSED", None: ""}[row.met if judged else None]
    per_row = "" if row.per_row is None else f"{row.per_row:.1f}x"
    median = "" if row.median is None else shown(row.median, row.unit)
    figures = f"{shown(row.figure, row.unit):>9} {median:>9} {per_row:>8} {target:>11} {met}"
    return f"{row.what:<{WIDTH}} {figures}{'; ' + row.note if row.note else ''}".rstrip()


def shown(value: float, unit: str) -> str:
    """A figure in its unit.

    >>> shown(12.34, "x"), shown(0.5, "%"), shown(2e-7, "")
    ('12.3x', '0.50 %', '2.0e-07')
    """
    if unit == "x":
        return f"{value:,.1f}x"
    return f"{value:.2f} %" if unit == "%" else f"{value:.1e}"
