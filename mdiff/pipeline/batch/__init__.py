"""Offline generation and encoding over files and processes."""

from mdiff.pipeline.batch.division import Division as Division
from mdiff.pipeline.batch.division import Share as Share
from mdiff.pipeline.batch.encoding import ROWS as ROWS
from mdiff.pipeline.batch.encoding import write_shards as write_shards
from mdiff.pipeline.batch.engines import ATTEMPTS as ATTEMPTS
from mdiff.pipeline.batch.engines import Maker as Maker
from mdiff.pipeline.batch.offline import generate_offline as generate_offline
from mdiff.pipeline.batch.plan import REQUEST_ERRORS as REQUEST_ERRORS
from mdiff.pipeline.batch.plan import Setting as Setting
from mdiff.pipeline.batch.plan import agree as agree
from mdiff.pipeline.batch.plan import error_line as error_line
from mdiff.pipeline.batch.runner import Shard as Shard
from mdiff.pipeline.batch.runner import make_all as make_all
