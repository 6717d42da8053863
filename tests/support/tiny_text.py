"""A small pipeline of text, untrained."""

from __future__ import annotations

from typing import Any

import torch

from mdiff.backbones.transformer import transformer
from mdiff.modalities.text.modality import text
from mdiff.pipeline.pipeline import Pipeline
from mdiff.schedule import Polynomial

WINDOW = 32


def tiny(*, eos: bool = False, **options: Any) -> Pipeline:
    torch.manual_seed(0)
    modality = text(eos=eos)
    size = modality.space.vocab_size
    model = transformer(vocab_size=size, width=16, depth=1, heads=2, max_length=WINDOW, **options)
    return Pipeline(model.eval(), modality.space, modality, Polynomial(3.0), WINDOW)
