"""`mdiff bench`: the hot loops against what other projects run."""

from mdiff.evaluation.bench.laws import Law as Law
from mdiff.evaluation.bench.run import Bench as Bench
from mdiff.evaluation.bench.timing import DEFAULT as DEFAULT
from mdiff.evaluation.bench.timing import FULL as FULL
from mdiff.evaluation.bench.timing import QUICK as QUICK
from mdiff.evaluation.bench.timing import Row as Row
from mdiff.evaluation.bench.timing import Size as Size
