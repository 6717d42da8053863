"""`mdiff inspect`: what a model is, with every tensor accounted for."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from mdiff.cli.console import result, result_json


def inspect(
    model: Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a model's kind, sizes, types, mask id and tensors."""
    report = inspected(model)
    if as_json:
        result_json(report)
        return
    for key in ("model", "path", "architecture", "parameters", "window", "schedule", "modality"):
        result(f"{key:<13} {report[key]}")
    space = report["space"]
    result(
        f"{'ids':<13} {space['vocab_size']} columns, mask {space['mask_id']}, "
        f"never {list(space['never'])}"
    )
    for tensor in report["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        result(f"  {tensor['dtype']:<5} {shape:>16}  {tensor['name']}  ({tensor['used']})")
    result(f"{len(report['tensors'])} tensors, {report['bytes']:,} bytes; not used: "
           f"{report['not_used'] or 'none'}")  # fmt: skip


def inspected(name: str) -> dict[str, Any]:
    """What the files hold and what of it the model uses.

    A tensor is "loaded" where the model has one of its name and shape, "renamed" where the
    loader maps its name, and "not used" else; a model with a weight missing does not load.
    """
    from dataclasses import asdict

    from mdiff.files import check_tensors
    from mdiff.locate import check_weights, locate
    from mdiff.pipeline import load

    folder = locate(name)
    pipeline = load(str(folder), device="cpu")
    module: Any = getattr(pipeline.denoiser, "model", pipeline.denoiser)
    own = {key: list(value.shape) for key, value in module.state_dict().items()}
    unused = set(getattr(pipeline.denoiser, "unused_tensors", ()))
    tensors = []
    for path in check_weights(folder, root=folder.parent.parent):
        for key, entry in sorted(check_tensors(path).items()):
            loaded = own.get(key) == entry["shape"]
            used = "not used" if key in unused else "loaded" if loaded else "renamed"
            tensors.append(
                {"name": key, "shape": entry["shape"], "dtype": entry["dtype"], "used": used}
                | {"bytes": entry["data_offsets"][1] - entry["data_offsets"][0]}
            )
    settings = pipeline.modality.config()
    return {
        "model": name,
        "path": str(folder),
        "architecture": type(module).__name__,
        "parameters": sum(math.prod(parameter.shape) for parameter in module.parameters()),
        "window": pipeline.window,
        "schedule": repr(pipeline.schedule),
        "modality": {key: value for key, value in settings.items() if key != "alphabet"},
        "space": asdict(pipeline.space),
        "tensors": tensors,
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "not_used": sorted(tensor["name"] for tensor in tensors if tensor["used"] == "not used"),
    }
