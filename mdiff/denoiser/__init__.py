"""The contract of a model, and the denoisers that wrap another one."""

from __future__ import annotations

from mdiff.denoiser.block_cache import FinishedBlocks as FinishedBlocks
from mdiff.denoiser.block_cache import finished_blocks as finished_blocks
from mdiff.denoiser.block_window import BlockWindow as BlockWindow
from mdiff.denoiser.block_window import CachedBlock as CachedBlock
from mdiff.denoiser.calls import block_length_of as block_length_of
from mdiff.denoiser.calls import evaluations as evaluations
from mdiff.denoiser.calls import fixed_evaluations as fixed_evaluations
from mdiff.denoiser.calls import flat_positions as flat_positions
from mdiff.denoiser.calls import has_own_head as has_own_head
from mdiff.denoiser.calls import of_peft as of_peft
from mdiff.denoiser.calls import row_request as row_request
from mdiff.denoiser.calls import unwrapped as unwrapped
from mdiff.denoiser.condition_names import MICRO as MICRO
from mdiff.denoiser.condition_names import POOLED as POOLED
from mdiff.denoiser.condition_names import STATES as STATES
from mdiff.denoiser.guidance import guided as guided
from mdiff.denoiser.negative_condition import negative_prompt as negative_prompt
from mdiff.denoiser.protocol import AsksRows as AsksRows
from mdiff.denoiser.protocol import BlockModel as BlockModel
from mdiff.denoiser.protocol import Cache as Cache
from mdiff.denoiser.protocol import Condition as Condition
from mdiff.denoiser.protocol import Denoiser as Denoiser
from mdiff.denoiser.protocol import FromLogits as FromLogits
from mdiff.denoiser.protocol import HasCache as HasCache
from mdiff.denoiser.protocol import HasCost as HasCost
from mdiff.denoiser.protocol import HasDevice as HasDevice
from mdiff.denoiser.protocol import HasFeatures as HasFeatures
from mdiff.denoiser.protocol import HasHead as HasHead
from mdiff.denoiser.protocol import HasLayers as HasLayers
from mdiff.denoiser.protocol import HasRowCost as HasRowCost
from mdiff.denoiser.protocol import RowBound as RowBound
from mdiff.denoiser.protocol import Rows as Rows
from mdiff.denoiser.protocol import Saveable as Saveable
from mdiff.denoiser.protocol import from_logits as from_logits
