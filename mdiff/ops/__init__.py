"""The operations of a step; each picks the backend that runs it."""

from mdiff.kernels.loss import CrossEntropy as CrossEntropy
from mdiff.kernels.reference import Draw as Draw
from mdiff.kernels.reveal_torch import Revealed as Revealed
from mdiff.kernels.reveal_torch import surest as surest
from mdiff.ops.backend import BACKENDS as BACKENDS
from mdiff.ops.backend import MISSING as MISSING
from mdiff.ops.backend import backend_name as backend_name
from mdiff.ops.categorical import BoundDraw as BoundDraw
from mdiff.ops.categorical import Filters as Filters
from mdiff.ops.categorical import LawReader as LawReader
from mdiff.ops.categorical import bind_draw as bind_draw
from mdiff.ops.categorical import draw as draw
from mdiff.ops.cross_entropy import masked_cross_entropy as masked_cross_entropy
from mdiff.ops.selection import reveal as reveal
