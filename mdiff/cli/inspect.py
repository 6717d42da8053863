"""`mdiff inspect`: what a model is, with every tensor accounted for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from mdiff.cli.console import result, result_json


def inspect(
    model: Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a model's kind, sizes, types, mask id and tensors; or a codec, by its folder."""
    if is_codec(model):
        codec_inspected(model, as_json=as_json)
        return
    report = inspected(model)
    if as_json:
        result_json(report)
        return
    for key in ("model", "path", "architecture", "parameters", "window", "schedule", "modality"):
        result(f"{key:<13} {report[key]}")
    for key, value in report.get("pictures", {}).items():
        result(f"{key:<13} {value}")
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

    from mdiff.codec import TENSORS
    from mdiff.files import check_tensors
    from mdiff.locate import check_weights, locate
    from mdiff.pipeline import load

    folder = locate(name)
    pipeline = load(str(folder), device="cpu")
    module: Any = getattr(pipeline.denoiser, "model", pipeline.denoiser)
    # The modules of a directory of several parts, by folder.
    first = getattr(pipeline.modality, "denoiser_folder", ".")
    modules = {first: module, **getattr(pipeline.modality, "folders", {})}
    own = {
        (part, key): list(value.shape)
        for part, each in modules.items()
        for key, value in each.state_dict().items()
    }
    unused = set(getattr(pipeline.denoiser, "unused_tensors", ()))
    tensors = []
    for path in check_weights(folder, root=folder.parent.parent):
        part = path.parent.relative_to(folder).as_posix()
        for key, entry in sorted(check_tensors(path).items()):
            loaded = own.get((part, key)) == entry["shape"]
            used = "not used" if key in unused else "loaded" if loaded else "renamed"
            tensors.append(described(key if part == "." else f"{part}/{key}", entry, used))
    if (folder / TENSORS).exists():
        # A codec takes all of its tensors or does not load.
        found = sorted(check_tensors(folder / TENSORS).items())
        tensors += [described(f"codec.{key}", entry, "loaded") for key, entry in found]
    settings = pipeline.modality.config()
    shown = hasattr(pipeline.modality, "shown")
    return {
        "model": name,
        "path": str(folder),
        "architecture": type(module).__name__,
        "parameters": sum(math.prod(parameter.shape) for parameter in module.parameters()),
        "window": pipeline.window,
        "schedule": repr(pipeline.schedule),
        "modality": {key: value for key, value in settings.items() if key != "alphabet"},
        **({"pictures": of_pictures(pipeline.modality)} if shown else {}),
        "space": asdict(pipeline.space),
        "tensors": tensors,
        "bytes": sum(tensor["bytes"] for tensor in tensors),
        "not_used": sorted(tensor["name"] for tensor in tensors if tensor["used"] == "not used"),
    }


def described(key: str, entry: dict[str, Any], used: str) -> dict[str, Any]:
    """A tensor of a file's header."""
    begin, end = entry["data_offsets"]
    kept = {name: entry[name] for name in ("shape", "dtype")}
    return {"name": key, **kept, "used": used, "bytes": end - begin}


def of_pictures(modality: Any) -> dict[str, Any]:
    """What a modality of pictures is: its codec, and what a canvas holds, part by part."""
    codec = modality.codec
    reach = "the whole picture" if codec.reach is None else f"{codec.reach} pixels beyond"
    found: dict[str, Any] = {
        "codec": f"{codec.name}, {codec.codebook_size} ids, {codec.splits} a place of "
        f"{codec.stride} x {codec.stride} pixels, reads {reach}, "
        f"{'lossless' if codec.lossless else 'lossy'}",
        "size": f"{modality.size[0]} x {modality.size[1]} pixels, {codec.channels} channels",
        "grid": f"{modality.cells[0]} x {modality.cells[1]} places",
    }
    if modality.label != "none":
        told = "the model is told" if modality.label == "condition" else "a part"
        found["labels"] = f"{told}: {', '.join(modality.labels or [])}"
    for name in modality.part_names:
        span, ids = modality.span(name), modality.parts.ids(name)
        places = span.stop - span.start
        found[f"part {name}"] = f"{places} tokens, ids {ids.start} to {ids.stop - 1}"
    return found


def is_codec(name: str) -> bool:
    """Whether the name is a folder of a codec alone."""
    from mdiff.codec import SETTINGS
    from mdiff.locate import CONFIG

    return (Path(name) / SETTINGS).exists() and not (Path(name) / CONFIG).exists()


def codec_inspected(name: str, *, as_json: bool) -> None:
    """Show a codec, as `mdiff tokenizer inspect` does."""
    from mdiff.cli.tokenizer import inspect as of_codec

    of_codec(name, data=None, size=None, resize=False, as_json=as_json)
