"""A small model of text, and a story."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_commands import WINDOW

from mdiff.backbones.transformer import transformer
from mdiff.modalities.text.modality import text
from mdiff.pipeline.pipeline import Pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    modality = text()
    denoiser = transformer(vocab_size=256, width=16, depth=1, heads=2, max_length=WINDOW)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    Pipeline(denoiser.eval(), modality.space, modality, window=WINDOW).save(folder)
    return str(folder)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("Once upon a time, a naïve cat sang. " * 20, encoding="utf-8")
    return path
