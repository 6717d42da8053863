"""The golden aMUSEd, and what its tests share."""

from __future__ import annotations

from folders import GOLDEN as GOLDEN_FOLDER
from safetensors.torch import load_file
from torch import Tensor

from mdiff.denoiser import MICRO, POOLED, STATES

HERE = GOLDEN_FOLDER


FOLDER = HERE / "amused"


GOLDEN = load_file(FOLDER / "golden.safetensors")


WEIGHTS = "diffusion_pytorch_model.safetensors"


PROMPTS = ("a red cat", "dog 3, no cat!", "")


# The published mask is the last row of the embedding; on our canvas it follows the 32 codes.
PUBLISHED_MASK, MASK = 39, 32


def conditions() -> dict[str, Tensor]:
    return {name: GOLDEN[f"uvit.{name}"] for name in (STATES, POOLED, MICRO)}
