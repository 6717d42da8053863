"""Layers and conventions that several backbones share."""

from __future__ import annotations

from mdiff.backbones.layers.published import CONFIG_FILE as CONFIG_FILE
from mdiff.backbones.layers.published import MOST_IDS as MOST_IDS
from mdiff.backbones.layers.published import MOST_LAYERS as MOST_LAYERS
from mdiff.backbones.layers.published import MOST_WIDTH as MOST_WIDTH
from mdiff.backbones.layers.published import Fields as Fields
from mdiff.backbones.layers.published import Published as Published
from mdiff.backbones.layers.transformer import RMSNorm as RMSNorm
from mdiff.backbones.layers.transformer import attend as attend
