"""Small models of pictures, a folder to write to, and a face to edit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from picture_commands import (
    LABELS,
    SIDE,
    kept,
    saved,
)
from PIL import Image

from mdiff.modalities.image.data.images import Pictures
from mdiff.modalities.image.modality import image


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Grey pictures of 8 x 8 with a label as their condition."""
    codec = {"name": "levels", "levels": 4, "step": 60}
    made = image(codec=codec, size=[SIDE, SIDE], label="condition", labels=LABELS)
    return saved(made, tmp_path_factory.mktemp("models") / "grey")


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Coloured pictures of 8 x 8 in codes of 2 pixels that read beyond them, with captions."""
    torch.manual_seed(1)
    codec = {"name": "vq", "stride": 2, "codebook_size": 16, "width": 8, "splits": 2}
    made = image(
        codec=codec, size=[SIDE, SIDE], label="part", labels=LABELS,
        caption={"length": 6, "vocab_size": 260},
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, SIDE, SIDE), generator=random).to(torch.uint8)
    names = [str(number) for number in range(6)]
    labels = torch.arange(6) % 3
    said = ["a cat", "a bee", "an ant"] * 2
    made.examples(Pictures(pixels, names, labels, list(LABELS), said), split="train")
    return saved(made, tmp_path_factory.mktemp("models") / "joint")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is read from its folder once, not by every command of this file."""
    monkeypatch.setattr("mdiff.pipeline.load", kept)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def face(here: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(here / "face.png")
    return here / "face.png"
