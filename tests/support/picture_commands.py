"""What tests of commands on pictures share."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mdiff.backbones.transformer import transformer
from mdiff.pipeline.loading import load
from mdiff.pipeline.pipeline import Pipeline

Captured = pytest.CaptureFixture[str]


SIDE = 8


LABELS = ["t-shirt", "sneaker", "ankle boot"]


QUICK = ["--sampler", "halton", "--steps", "3"]


KEYS = {"tokens", "calls", "seconds", "log_prob", "log_prob_is_exact", "entropy", "seed", "writing"}


def saved(modality: Any, folder: Path) -> str:
    torch.manual_seed(0)
    space = modality.space
    denoiser = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, layout=modality.layout,
        classes=modality.classes, width=16, depth=1, heads=2, init_std=0.3,
    )  # fmt: skip
    Pipeline(denoiser.eval(), space, modality, window=modality.length).save(folder)
    return str(folder)


def kept(model: Any, **options: Any) -> Pipeline:
    """The model; of those by a name one for all commands."""
    return by_name(model, **options) if isinstance(model, str) else load(model, **options)


by_name = functools.cache(load)


def in_greys(path: Path) -> None:
    """The picture in the four greys that the grey model's codec knows."""
    Image.fromarray(array(path)[..., 0] // 64 * 60).save(path)


def array(path: Path) -> Any:
    with Image.open(path) as opened:
        return np.array(opened)
