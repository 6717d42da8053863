"""Where evaluated data is cut: as the flags say, else as the run that is evaluated was."""

from dataclasses import dataclass, field
from pathlib import Path

from mdiff.cli.views.console import message
from mdiff.errors import CheckpointError

TRAINING = "training.json"
# Of a model that is no run; the recipes' own.
DEFAULTS = {"holdout": 0.1, "validation": 0.0}


@dataclass(frozen=True)
class Cut:
    """`shares` are holdout and validation; `digest` is that of the data that a run was trained on.

    The digest is None where there is no run or the cut is another, "" where it has recorded none.
    """

    shares: dict[str, float] = field(default_factory=lambda: dict(DEFAULTS))
    digest: str | None = None

    def compare(self, digest: str) -> None:
        """Say so where the training split of the data, by its digest, is not the run's."""
        if self.digest == "":
            message("the run has not recorded its data: it may have been trained on some of this")
        elif self.digest not in (None, digest):
            message(
                "the training split of this data is not what the run was trained on: where they "
                "overlap, what is held out here may have been trained on"
            )


def cut_of(model: str, **asked: float | None) -> Cut:
    """The cut of `asked` holdout and validation, where these are None of the run `model`.

    A line says where what is asked for is not the run's. Raises CheckpointError where the run's
    settings cannot be read.
    """
    run = _run(model)
    own = DEFAULTS if run is None else {k: run[0].get(k, v) for k, v in DEFAULTS.items()}
    shares = {name: own[name] if value is None else value for name, value in asked.items()}
    if run is None:
        return Cut(shares)
    if shares == own:
        return Cut(shares, str(run[1].get("sha256", "")))
    cuts = (", ".join(f"{name} {value}" for name, value in each.items()) for each in (own, shares))
    message(f"the run was trained with {next(cuts)}, this is {next(cuts)}: the splits overlap")
    return Cut(shares)


def _run(model: str) -> tuple[dict[str, float], dict[str, object]] | None:
    """The recipe's data, and what names it, of the checkpoint that `model` means, if it has one."""
    from mdiff.files import latest, read_json

    folder = Path(model).expanduser()
    path = ((latest(folder) or folder) if folder.is_dir() else folder) / TRAINING
    if not path.is_file():
        return None
    found = read_json(path)
    recipe = found["recipe"] if isinstance(found.get("recipe"), dict) else {}
    options, named = recipe.get("data"), found.get("data")
    if not isinstance(options, dict) or not isinstance(named, dict):
        raise CheckpointError(f"{path} does not say what the run was trained on")
    return options, named
