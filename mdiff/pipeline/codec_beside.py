"""The codec that lies beside a generator over a grid, and the modality that they make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mdiff.errors import CheckpointError
from mdiff.find import find
from mdiff.modalities.image import load_codec

CODEC_FOLDER = "codec"


def modality_beside(folder: Path, module: Any) -> Any:
    """The modality of a generator in `folder` with the codec in codec/; None without one.

    A generator over a grid says `cells` (h, w), `splits`, the tokens of a place, and `classes`;
    labels are the numbers of its classes. Raises CheckpointError where the two do not fit.
    """
    beside = folder / CODEC_FOLDER
    if not beside.is_dir() or not hasattr(module, "cells"):
        return None
    codec = load_codec(beside)
    if codec.splits != module.splits and hasattr(codec, "in_groups"):
        codec = codec.in_groups(module.splits)
    if (codec.splits, codec.codebook_size) != (module.splits, module.mask_id):
        raise CheckpointError(
            f"{beside} has {codec.splits} x {codec.codebook_size} ids a place, the model "
            f"{module.splits} x {module.mask_id}: they are not of the same training"
        )
    return find("modalities", "image")(
        codec=codec, size=[side * codec.stride for side in module.cells], label="condition",
        labels=[str(number) for number in range(module.classes)],
    )  # fmt: skip
