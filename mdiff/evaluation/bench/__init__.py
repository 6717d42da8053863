"""`mdiff bench`: the hot loops against what other projects run."""

from mdiff.evaluation.bench.laws import Law as Law
from mdiff.evaluation.bench.run import Bench as Bench
from mdiff.evaluation.bench.run import one_thread as one_thread
from mdiff.evaluation.bench.samplers import Amount as Amount
from mdiff.evaluation.bench.samplers import SamplerRow as SamplerRow
from mdiff.evaluation.bench.samplers import sampler_rows as sampler_rows
from mdiff.evaluation.bench.samplers import toy_floor as toy_floor
from mdiff.evaluation.bench.timing import DEFAULT as DEFAULT
from mdiff.evaluation.bench.timing import FULL as FULL
from mdiff.evaluation.bench.timing import QUICK as QUICK
from mdiff.evaluation.bench.timing import Row as Row
from mdiff.evaluation.bench.timing import Size as Size
from mdiff.evaluation.bench.timing import machine as machine
