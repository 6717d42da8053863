"""`mdiff inspect`: what a model is, with every tensor accounted for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdiff.cli.models import fits as show_whether_it_fits
from mdiff.cli.options import Model, OneObject
from mdiff.cli.tokenizer import inspect as inspect_codec
from mdiff.cli.views.console import result, result_json
from mdiff.errors import ConfigError, MdiffError

if TYPE_CHECKING:
    from torch import nn

    from mdiff.files import ModelFiles
    from mdiff.modalities import Modality
    from mdiff.modalities.image import ImageModality
    from mdiff.pipeline import TensorReport


def inspect(
    context: typer.Context,
    model: Model,
    fits: Annotated[bool, "Whether its weights fit this machine; nothing is downloaded."] = False,
    as_json: OneObject = False,
) -> None:
    """Show a model's kind, sizes, types, mask id and tensors; or a codec, by its folder."""
    if fits:
        show_whether_it_fits(model, as_json)
        return
    if is_codec(model):
        inspect_codec(context, model, as_json=as_json)
        return
    from mdiff.files import at_home, locate
    from mdiff.pipeline import is_foreign, loose, report

    fault: MdiffError | None = None
    unknown = loose(at_home(model))
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
    "model", "path", "architecture", "family", "parameters", "sizes", "window", "shift",
    "block_length", "noise", "predicts", "uses_time", "refused", "schedule", "modality", "types",
    "missing",
)  # fmt: skip


def shown(report: Mapping[str, Any]) -> None:
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
    unused = report["not_used"] or "none"
    result(f"{len(report['tensors'])} tensors, {report['bytes']:,} bytes; not used: {unused}")


def _line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {child}" for key, child in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def inspected(name: str, files: ModelFiles) -> dict[str, object]:
    """The report on a model that mdiff loads, with every tensor of its files."""
    from torch import nn

    from mdiff.backbones.masked_lm import MaskedLM
    from mdiff.modalities.image import ImageModality
    from mdiff.pipeline import described_prediction, load, summed

    pipeline = load(files, device="cpu")
    denoiser, modality = pipeline.denoiser, pipeline.modality
    module = denoiser.model if isinstance(denoiser, MaskedLM) else denoiser
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name}: a {type(module).__name__} has no tensors to inspect")
    settings = modality.config()
    return {
        "model": name,
        "path": str(files.folder),
        "architecture": type(module).__name__,
        "parameters": sum(math.prod(parameter.shape) for parameter in module.parameters()),
        "window": pipeline.window,
        "noise": repr(pipeline.noise) if pipeline.noise else "mask",
        "predicts": described_prediction(
            "mixed" if pipeline.noise else "mask", vars(module).get("predicts")
        ),
        "schedule": repr(pipeline.schedule),
        "modality": {key: value for key, value in settings.items() if key != "alphabet"},
        **({"pictures": of_pictures(modality)} if isinstance(modality, ImageModality) else {}),
        "space": asdict(pipeline.space),
        **summed(tensors_of(files, module, modality)),
    }


def tensors_of(files: ModelFiles, module: nn.Module, modality: Modality) -> list[TensorReport]:
    """Every tensor of a model's files and of the codec beside it.

    A tensor is "loaded" where the model has one of its name and shape, else "renamed": the
    loader maps its name, since a model with a weight missing does not load.
    """
    from mdiff.files import check_tensors
    from mdiff.modalities import HasFolders, ShowsImages
    from mdiff.modalities.image import PUBLISHED_TENSORS, TENSORS
    from mdiff.pipeline import CODEC_FOLDER, described_tensor

    folder, modules = files.folder, {".": module}
    if isinstance(modality, HasFolders):
        modules = {modality.denoiser_folder: module, **modality.folders}
    own = {
        (part, key): list(value.shape)
        for part, each in modules.items()
        for key, value in each.state_dict().items()
    }
    tensors = []
    for path, header in files.headers.items():
        part = path.parent.relative_to(folder).as_posix()
        for key, entry in sorted(header.items()):
            used = "loaded" if own.get((part, key)) == entry["shape"] else "renamed"
            tensors.append(described_tensor(key if part == "." else f"{part}/{key}", entry, used))
    beside = (folder, folder / CODEC_FOLDER) if isinstance(modality, ShowsImages) else ()
    for path in (at / name for at in beside for name in (TENSORS, PUBLISHED_TENSORS)):
        if path.exists() and path != folder / PUBLISHED_TENSORS:
            # A codec takes all of its tensors or does not load.
            found = sorted(check_tensors(path).items())
            tensors += [described_tensor(f"codec.{key}", entry, "loaded") for key, entry in found]
    return tensors


def of_pictures(modality: ImageModality) -> dict[str, str]:
    """The codec of a modality of pictures, and the parts of its canvas."""
    codec, margin = modality.codec, modality.codec.receptive_field_margin
    reads = "the whole picture" if margin is None else f"{margin} pixels beyond"
    found = {
        "codec": f"{codec.name}, {codec.codebook_size} ids, {codec.codes_per_position} a position "
        f"of {codec.stride} x {codec.stride} pixels, reads {reads}, "
        f"{'lossless' if codec.lossless else 'lossy'}",
        "size": f"{modality.size[0]} x {modality.size[1]} pixels, {codec.channels} channels",
        "grid": f"{modality.latent_grid[0]} x {modality.latent_grid[1]} positions",
    }
    if modality.label != "none":
        kind = "a condition" if modality.label == "condition" else "a part"
        found["labels"] = f"{kind}: {', '.join(modality.labels or [])}"
    for name in modality.part_names:
        span, ids = modality.span(name), modality.parts[name].ids
        count = span.stop - span.start
        found[f"part {name}"] = f"{count} tokens, ids {ids.start} to {ids.stop - 1}"
    return found


def is_codec(name: str) -> bool:
    """Whether the name is a folder of a codec alone."""
    from mdiff.files import CONFIG, PIPELINE, at_home
    from mdiff.modalities.image import SETTINGS, holds_codec

    path = at_home(name)
    if (path / SETTINGS).exists():
        return not (path / CONFIG).exists()
    return not (path / PIPELINE).exists() and holds_codec(path)
