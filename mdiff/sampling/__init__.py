"""The unmasking loop that samplers share, and running a sampler by its name."""

from mdiff.sampling.binding import BoundSampler as BoundSampler
from mdiff.sampling.binding import Sampler as Sampler
from mdiff.sampling.binding import bind as bind
from mdiff.sampling.counts import Counts as Counts
from mdiff.sampling.counts import positions_of_step as positions_of_step
from mdiff.sampling.counts import reveal_counts as reveal_counts
from mdiff.sampling.counts import schedule_counts as schedule_counts
from mdiff.sampling.counts import useful_steps as useful_steps
from mdiff.sampling.orders import best_of as best_of
from mdiff.sampling.orders import reveal_in_turn as reveal_in_turn
from mdiff.sampling.orders import turns as turns
from mdiff.sampling.remasking import MOST_STEPS as MOST_STEPS
from mdiff.sampling.remasking import grid_of_shares as grid_of_shares
from mdiff.sampling.remasking import largest_sigma as largest_sigma
from mdiff.sampling.remasking import remask as remask
from mdiff.sampling.remasking import stays_hidden as stays_hidden
from mdiff.sampling.run import Sample as Sample
from mdiff.sampling.run import Tally as Tally
from mdiff.sampling.run import sample as sample
from mdiff.sampling.seeds import plain_seed as plain_seed
from mdiff.sampling.seeds import row_seeds as row_seeds
from mdiff.sampling.seeds import streams as streams
from mdiff.sampling.state import LastWriting as LastWriting
from mdiff.sampling.state import State as State
from mdiff.sampling.unmasking import Unmasking as Unmasking
from mdiff.sampling.unmasking import free_positions as free_positions
