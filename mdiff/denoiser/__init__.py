"""The contract of a model, and the denoisers that wrap another one."""

from __future__ import annotations

from mdiff.denoiser.block_cache import FinishedBlocks as FinishedBlocks
from mdiff.denoiser.block_cache import can_keep as can_keep
from mdiff.denoiser.block_cache import own_blocks as own_blocks
from mdiff.denoiser.condition_names import MICRO as MICRO
from mdiff.denoiser.condition_names import POOLED as POOLED
from mdiff.denoiser.condition_names import STATES as STATES
from mdiff.denoiser.negative_condition import away_from as away_from
from mdiff.denoiser.negative_condition import other_start as other_start
from mdiff.denoiser.places import counted as counted
from mdiff.denoiser.places import places_of as places_of
from mdiff.denoiser.protocol import Condition as Condition
from mdiff.denoiser.protocol import Denoiser as Denoiser
from mdiff.denoiser.protocol import FromLogits as FromLogits
from mdiff.denoiser.protocol import Rows as Rows
from mdiff.denoiser.protocol import asker as asker
from mdiff.denoiser.protocol import evaluations as evaluations
from mdiff.denoiser.protocol import from_logits as from_logits
from mdiff.denoiser.protocol import guided as guided
from mdiff.denoiser.protocol import own_head as own_head
from mdiff.denoiser.protocol import rows_of as rows_of
