"""Published models that open here, their sizes, and the memory that their weights take."""

import json
import math
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from mdiff.errors import BackendError
from mdiff.files.locate import BUILTIN, at_home, builtin_models, locate

# Bytes of a weight.
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


class Entry(NamedTuple):
    """A family: its row of docs/checkpoints.md, what config.json names, and published models.

    `models` are their names with the number of parameters that the name says, None where it says
    none; `flags` those of `mdiff generate` that they are used with.
    """

    family: str
    medium: str
    architecture: str
    models: dict[str, int | None]
    flags: str


@cache
def catalogue() -> tuple[Entry, ...]:
    """The families that open here; see catalogue.json beside this file."""
    written = files("mdiff.files").joinpath("catalogue.json").read_text(encoding="utf-8")
    return tuple(Entry(**one) for one in json.loads(written))


def parameters_of(name: str) -> tuple[int, str]:
    """How many parameters a model has, and where that is from; no weight is read or fetched.

    From the headers of a local model, else the catalogue's, else the headers on the Hub. Raises
    what `locate` does for a local one, and BackendError where the Hub cannot be asked.
    """
    local = name.startswith((BUILTIN, ".", "/", "~")) or name in builtin_models()
    if local or at_home(name).exists():
        entries = locate(name).entries.values()
        return sum(math.prod(entry["shape"]) for entry in entries), "its files"
    stated = {id_: size for entry in catalogue() for id_, size in entry.models.items()}
    repository, _, revision = name.partition("@")
    if (size := stated.get(repository)) is not None:
        return size, "the catalogue: mdiff models"
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(repository, revision=revision or None)
        return sum(found.parameter_count.values()), "the Hub"
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        close = get_close_matches(name, stated, n=1)
        beside = f" (which has {close[0]})" if close and close[0] != repository else ""
        raise BackendError(
            f"{name} is no directory here, has no size in the catalogue{beside}, and the Hub "
            f"cannot be asked for it: {first}"
        ) from error
