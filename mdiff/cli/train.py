"""`mdiff train`: a recipe in, checkpoints out."""

from pathlib import Path
from typing import Annotated

import typer

from mdiff.cli.views.console import result


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, such as configs/text/tiny.yaml.")],
    out: Annotated[Path, "The directory of the run."],
    overrides: Annotated[
        list[str] | None, "Replace a value, as in train.steps=40; may be repeated."
    ] = None,
    resume: Annotated[str, "auto (the newest complete checkpoint), none, or a directory."] = "auto",
) -> None:
    """Train a model; print the path of its last checkpoint."""
    from mdiff.training import load_recipe

    settings = load_recipe(recipe, overrides or ())

    from mdiff.training import is_main_process, to_stderr
    from mdiff.training import train as run

    path = run(settings, out, resume=resume, report=to_stderr)
    if is_main_process():
        result(str(path))
