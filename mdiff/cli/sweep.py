"""`mdiff sweep`: a recipe trained with every combination of a grid's values, and compared."""

from pathlib import Path
from typing import Annotated

import typer

import mdiff.cli.options as ask
from mdiff.cli.views.console import message, result, result_json
from mdiff.errors import ConfigError, DataError, nearest

FITS = ("scaling",)


def sweep(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, such as configs/text/sweep.yaml.")],
    *,
    grid: Annotated[
        list[str],
        "Values of a key, as in model.width=64,128; sample.KEY is an option of sampling "
        "from the trained models. May be repeated.",
    ],
    out: Annotated[Path, "The directory of the sweep."],
    overrides: Annotated[list[str] | None, "Replace a value of the recipe."] = None,
    seeds: Annotated[int, "Runs of each combination, from train.seed on."] = 1,
    fit: Annotated[str | None, "scaling: fit L = E + A / N^a + B / D^b."] = None,
    samples: Annotated[int, "Samples for each setting of sample.KEY."] = 32,
    workers: Annotated[int | None, "Processes that train, of one thread each."] = None,
    dividing: ask.Dividing,
    as_json: Annotated[bool, "Print what sweep.json holds."] = False,
) -> None:
    """Train what is missing of a grid; print bounds with standard errors."""
    if fit is not None and fit not in FITS:
        raise ConfigError(f"--fit {fit!r}; {nearest(fit, FITS)}")
    division = dividing.division(workers)

    from mdiff.sweeps import planned, run_sweep, table

    plan = planned(
        recipe, grid, overrides=overrides or (), seeds=seeds, num_samples=samples,
        fit=fit is not None,
    )  # fmt: skip
    found = run_sweep(plan, out, division=division, report=message)
    if found is None:
        return
    if as_json:
        result_json(found.content())
    else:
        for line in table(found):
            result(line)
    message(f"wrote {out / 'sweep.json'} and {out / 'sweep.svg'}")
    if found.failures:
        first = found.failures[0]
        raise DataError(
            f"{len(found.failures)} of {len(plan.runs)} runs failed, see {out / 'failures.jsonl'}; "
            f"run {first['run']}: {first['error']}"
        )
