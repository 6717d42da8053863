"""The unmasking loop that samplers share, and running a sampler by its name."""

from __future__ import annotations

from mdiff.sampling.run import Sample as Sample
from mdiff.sampling.run import Sampler as Sampler
from mdiff.sampling.run import Tally as Tally
from mdiff.sampling.run import in_blocks as in_blocks
from mdiff.sampling.run import option_types as option_types
from mdiff.sampling.run import plain_seed as plain_seed
from mdiff.sampling.run import resolve as resolve
from mdiff.sampling.run import sample as sample
from mdiff.sampling.unmasking import Counts as Counts
from mdiff.sampling.unmasking import State as State
from mdiff.sampling.unmasking import Unmasking as Unmasking
from mdiff.sampling.unmasking import positions_of_step as positions_of_step
from mdiff.sampling.unmasking import reveal_counts as reveal_counts
from mdiff.sampling.unmasking import reveal_in_turn as reveal_in_turn
from mdiff.sampling.unmasking import schedule_counts as schedule_counts
from mdiff.sampling.unmasking import streams as streams
from mdiff.sampling.unmasking import turns as turns
