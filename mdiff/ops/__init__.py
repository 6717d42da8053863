"""The operations of a step; each picks the backend that runs it."""

from __future__ import annotations

from mdiff.ops.categorical import BACKENDS as BACKENDS
from mdiff.ops.categorical import MISSING as MISSING
from mdiff.ops.categorical import Draw as Draw
from mdiff.ops.categorical import Revealed as Revealed
from mdiff.ops.categorical import backend_name as backend_name
from mdiff.ops.categorical import draw as draw
from mdiff.ops.categorical import drawing as drawing
from mdiff.ops.categorical import masked_cross_entropy as masked_cross_entropy
from mdiff.ops.categorical import reveal as reveal
