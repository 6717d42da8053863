"""Training: from a recipe to checkpoints."""

from mdiff.training.build import Size as Size
from mdiff.training.build import medium_of as medium_of
from mdiff.training.build import size_of as size_of
from mdiff.training.log import LOG as LOG
from mdiff.training.log import to_stderr as to_stderr
from mdiff.training.loop import STOPS as STOPS
from mdiff.training.loop import train as train
from mdiff.training.processes import is_main_process as is_main_process
from mdiff.training.recipe import Recipe as Recipe
from mdiff.training.recipe import load_recipe as load_recipe
from mdiff.training.recipe import parse_recipe as parse_recipe
from mdiff.training.recipe import values as values
