"""Layers and conventions that several backbones share."""

from mdiff.backbones.layers.backbone import Backbone as Backbone
from mdiff.backbones.layers.grid import GridModel as GridModel
from mdiff.backbones.layers.modules import RMSNorm as RMSNorm
from mdiff.backbones.layers.transformers_models import check_settings as check_settings
