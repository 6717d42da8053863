"""Training: from a recipe to checkpoints."""

from mdiff.training.log import to_stderr as to_stderr
from mdiff.training.loop import train as train
from mdiff.training.processes import is_main_process as is_main_process
from mdiff.training.recipe import load_recipe as load_recipe
