"""Reading and writing files: untrusted input, atomic writes, weights, locating a model."""

from __future__ import annotations

from mdiff.files.atomic import MANIFEST as MANIFEST
from mdiff.files.atomic import complete as complete
from mdiff.files.atomic import latest as latest
from mdiff.files.atomic import locked as locked
from mdiff.files.atomic import replace_file as replace_file
from mdiff.files.atomic import staged as staged
from mdiff.files.atomic import step_path as step_path
from mdiff.files.atomic import steps as steps
from mdiff.files.atomic import sweep as sweep
from mdiff.files.atomic import verify as verify
from mdiff.files.atomic import write_json as write_json
from mdiff.files.config_fields import CONFIG as CONFIG
from mdiff.files.config_fields import MOST_EXPERTS as MOST_EXPERTS
from mdiff.files.config_fields import MOST_IDS as MOST_IDS
from mdiff.files.config_fields import MOST_LAYERS as MOST_LAYERS
from mdiff.files.config_fields import MOST_WIDTH as MOST_WIDTH
from mdiff.files.config_fields import Fields as Fields
from mdiff.files.locate import BUILTIN as BUILTIN
from mdiff.files.locate import locate as locate
from mdiff.files.model_files import MODEL_INDEX as MODEL_INDEX
from mdiff.files.model_files import PIPELINE as PIPELINE
from mdiff.files.model_files import WEIGHTS as WEIGHTS
from mdiff.files.model_files import ModelFiles as ModelFiles
from mdiff.files.model_files import read_headers as read_headers
from mdiff.files.model_files import read_model_files as read_model_files
from mdiff.files.untrusted import MAX_JSON_BYTES as MAX_JSON_BYTES
from mdiff.files.untrusted import MAX_JSON_VALUES as MAX_JSON_VALUES
from mdiff.files.untrusted import PICKLE_STARTS as PICKLE_STARTS
from mdiff.files.untrusted import PICKLE_SUFFIXES as PICKLE_SUFFIXES
from mdiff.files.untrusted import Header as Header
from mdiff.files.untrusted import TensorEntry as TensorEntry
from mdiff.files.untrusted import check_tensors as check_tensors
from mdiff.files.untrusted import has_too_many_values as has_too_many_values
from mdiff.files.untrusted import inside as inside
from mdiff.files.untrusted import parse_json as parse_json
from mdiff.files.untrusted import read_json as read_json
from mdiff.files.untrusted import read_tensors as read_tensors
from mdiff.files.untrusted import refuse_special as refuse_special
from mdiff.files.weights import TRANSFORMERS as TRANSFORMERS
from mdiff.files.weights import TYPES as TYPES
from mdiff.files.weights import DeviceMap as DeviceMap
from mdiff.files.weights import load_weights as load_weights
from mdiff.files.weights import problems as problems
from mdiff.files.yaml import parse_yaml as parse_yaml
