"""Sweeps: grids of training runs over processes, their bounds compared, scaling laws fitted."""

from mdiff.sweeps.grid import Plan as Plan
from mdiff.sweeps.grid import planned as planned
from mdiff.sweeps.job import run_sweep as run_sweep
from mdiff.sweeps.scaling import Scaling as Scaling
from mdiff.sweeps.scaling import fit_scaling as fit_scaling
from mdiff.sweeps.summary import Summary as Summary
from mdiff.sweeps.summary import table as table
