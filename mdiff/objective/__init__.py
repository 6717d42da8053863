"""The training objective: corruption, loss, bounds and condition dropout."""

from mdiff.objective.bound import Bound as Bound
from mdiff.objective.bound import nll_bound as nll_bound
from mdiff.objective.conditioning import JOINED as JOINED
from mdiff.objective.conditioning import GivenParts as GivenParts
from mdiff.objective.conditioning import drop_condition as drop_condition
from mdiff.objective.conditioning import hideable_positions as hideable_positions
from mdiff.objective.corruption import corrupt as corrupt
from mdiff.objective.corruption import maskable_positions as maskable_positions
from mdiff.objective.corruption import stratified_times as stratified_times
from mdiff.objective.corruption import truncated_normal as truncated_normal
from mdiff.objective.diffusion import diffusion_loss as diffusion_loss
from mdiff.objective.loss import Loss as Loss
from mdiff.objective.loss import masked_diffusion_loss as masked_diffusion_loss
from mdiff.objective.loss import refuse_blocks as refuse_blocks
from mdiff.objective.nll import token_nll as token_nll
