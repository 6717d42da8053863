"""`mdiff convert`: published weights in the layout that mdiff opens, safetensors and JSON."""

from pathlib import Path
from typing import Annotated

import typer

from mdiff.cli.options import OneObject
from mdiff.cli.views.console import message, result, result_json

# So many names of what was left out are shown; the rest are counted.
SHOWN = 8


def convert(
    source: Annotated[Path, typer.Argument(help="A .pth, .ckpt or .safetensors file.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    from_pickle: Annotated[bool, "Open a pickle, in torch's restricted reader."] = False,
    family: Annotated[str | None, "Backbone or codec, where the config does not say."] = None,
    config: Annotated[Path | None, "JSON or YAML of its sizes; one beside it if not given."] = None,
    ema: Annotated[bool, "Take the averaged weights."] = False,
    codec: Annotated[Path | None, "A codec's folder, to lie beside a generator."] = None,
    as_json: OneObject = False,
) -> None:
    """Write config.json and model.safetensors of a published file; print the folder."""
    from mdiff.pipeline import convert as converted

    done = converted(
        source, out, from_pickle=from_pickle, family=family, config=config, ema=ema, codec=codec
    )
    left = ", ".join(done.dropped[:SHOWN])
    more = f" and {len(done.dropped) - SHOWN} more" if len(done.dropped) > SHOWN else ""
    message(f"{done.family}: {len(done.tensors)} tensors; left out: {left or 'nothing'}{more}")
    if as_json:
        result_json({
            "out": str(out), "family": done.family, "tensors": len(done.tensors),
            "dropped": done.dropped,
        })  # fmt: skip
    else:
        result(str(out))
