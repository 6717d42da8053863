"""Weights of golden codecs, made anew by the rule of tests/golden/README.md."""

from __future__ import annotations

import json
import zlib

import numpy as np
import torch
from folders import GOLDEN as GOLDEN
from torch import Tensor


def hashed(key: str, shape: list[int], scale: float, offset: float, *, salt: int) -> Tensor:
    """Weights offset + scale (2 u - 1), u a hash of (row-major index, key, salt); float32."""
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        x = np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B1)
        x += np.uint32(zlib.crc32(key.encode()))
        x += np.uint32(salt)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        x ^= x >> np.uint32(16)
    u = x.astype(np.float64) / 2**32
    return torch.from_numpy((offset + scale * (2 * u - 1)).astype(np.float32).reshape(shape))


def golden_weights(name: str) -> dict[str, Tensor]:
    """The state dict of the golden `name`, whose weights.json says how to make it."""
    told = json.loads((GOLDEN / name / "weights.json").read_text())
    (entries,) = (value for value in told.values() if isinstance(value, list))
    return {key: hashed(key, *rest, salt=told["salt"]) for key, *rest in entries}
