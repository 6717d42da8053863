"""`mdiff inspect`: what a model is, with every tensor accounted for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli.views.console import result, result_json
from mdiff.errors import MdiffError

if TYPE_CHECKING:
    from mdiff.files import ModelFiles
    from mdiff.modalities.image import ImageModality


def inspect(
    model: Annotated[str, typer.Argument(help="builtin:NAME, a directory or a Hub id.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a model's kind, sizes, types, mask id and tensors; or a codec, by its folder."""
    if is_codec(model):
        codec_inspected(model, as_json=as_json)
        return
    from mdiff.files import locate
    from mdiff.pipeline import is_foreign, loose, report

    fault: MdiffError | None = None
    unknown = loose(Path(model).expanduser())
    if unknown is not None:
        found, fault = unknown
    elif is_foreign(files := locate(model)):
        found, fault = report(files)
    else:
        found = inspected(model, files)
    found = {"model": model, **found}
    if as_json:
        result_json(found)
    else:
        shown(found)
    if fault is not None:
        raise fault


LINES = (
    "model", "path", "architecture", "family", "parameters", "sizes", "window", "shifted",
    "uses_time", "block_length", "refused", "schedule", "modality", "types", "missing",
)  # fmt: skip


def shown(report: dict[str, Any]) -> None:
    """Print a report, one line an entry and one a tensor."""
    for key in LINES:
        if report.get(key) not in (None, []):
            result(f"{key.replace('_', ' '):<13} {_line(report[key])}")
    if not report.get("supported", True):
        result(f"{'supported':<13} no: its files are listed, it cannot be loaded")
    for key, value in report.get("pictures", {}).items():
        result(f"{key:<13} {value}")
    if "space" in report:
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


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {child}" for key, child in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def inspected(name: str, files: ModelFiles) -> dict[str, Any]:
    """What the files hold and what of it the model uses.

    A tensor is "loaded" where the model has one of its name and shape, "renamed" where the
    loader maps its name, and "not used" else; a model with a weight missing does not load.
    """
    from dataclasses import asdict

    from mdiff.files import check_tensors
    from mdiff.modalities import HasFolders, ShowsImages
    from mdiff.modalities.image import PUBLISHED_TENSORS, TENSORS, ImageModality
    from mdiff.pipeline import CODEC_FOLDER, described_tensor, load, summed

    folder = files.folder
    pipeline = load(str(folder), device="cpu")
    module: Any = getattr(pipeline.denoiser, "model", pipeline.denoiser)
    # The modules of a directory of several parts, by folder.
    modality = pipeline.modality
    split = modality if isinstance(modality, HasFolders) else None
    modules = {"." if split is None else split.denoiser_folder: module}
    modules |= {} if split is None else split.folders
    own = {
        (part, key): list(value.shape)
        for part, each in modules.items()
        for key, value in each.state_dict().items()
    }
    unused = set(getattr(pipeline.denoiser, "unused_tensors", ()))
    tensors = []
    for path, header in files.headers.items():
        part = path.parent.relative_to(folder).as_posix()
        for key, entry in sorted(header.items()):
            loaded = own.get((part, key)) == entry["shape"]
            used = "not used" if key in unused else "loaded" if loaded else "renamed"
            whole = key if part == "." else f"{part}/{key}"
            tensors.append(described_tensor(whole, entry, used))
    beside = (folder, folder / CODEC_FOLDER) if isinstance(modality, ShowsImages) else ()
    for path in (at / name for at in beside for name in (TENSORS, PUBLISHED_TENSORS)):
        if path.exists() and path != folder / PUBLISHED_TENSORS:
            # A codec takes all of its tensors or does not load.
            found = sorted(check_tensors(path).items())
            tensors += [described_tensor(f"codec.{key}", entry, "loaded") for key, entry in found]
    settings = modality.config()
    return {
        "model": name,
        "path": str(folder),
        "architecture": type(module).__name__,
        "parameters": sum(math.prod(parameter.shape) for parameter in module.parameters()),
        "window": pipeline.window,
        "schedule": repr(pipeline.schedule),
        "modality": {key: value for key, value in settings.items() if key != "alphabet"},
        **({"pictures": of_pictures(modality)} if isinstance(modality, ImageModality) else {}),
        "space": asdict(pipeline.space),
        **summed(tensors),
    }


def of_pictures(modality: ImageModality) -> dict[str, Any]:
    """What a modality of pictures is: its codec, and what a canvas holds, part by part."""
    codec = modality.codec
    margin = codec.receptive_field_margin
    reads = "the whole picture" if margin is None else f"{margin} pixels beyond"
    found: dict[str, Any] = {
        "codec": f"{codec.name}, {codec.codebook_size} ids, {codec.codes_per_position} a place of "
        f"{codec.stride} x {codec.stride} pixels, reads {reads}, "
        f"{'lossless' if codec.lossless else 'lossy'}",
        "size": f"{modality.size[0]} x {modality.size[1]} pixels, {codec.channels} channels",
        "grid": f"{modality.latent_grid[0]} x {modality.latent_grid[1]} places",
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
    from mdiff.files import CONFIG, PIPELINE
    from mdiff.modalities.image import SETTINGS, holds_codec

    path = Path(name)
    if (path / SETTINGS).exists():
        return not (path / CONFIG).exists()
    return not (path / PIPELINE).exists() and holds_codec(path)


def codec_inspected(name: str, *, as_json: bool) -> None:
    """Show a codec, as `mdiff tokenizer inspect` does."""
    from mdiff.cli.tokenizer import inspect as of_codec

    of_codec(name, data=None, size=None, resize=False, as_json=as_json)
