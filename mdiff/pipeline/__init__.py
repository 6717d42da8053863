"""The front of the library: load, save, generate and score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mdiff.pipeline.features import features as features
from mdiff.pipeline.generation import Generated as Generated
from mdiff.pipeline.generation import Generation as Generation
from mdiff.pipeline.inspection import TensorReport as TensorReport
from mdiff.pipeline.inspection import described_prediction as described_prediction
from mdiff.pipeline.inspection import described_tensor as described_tensor
from mdiff.pipeline.inspection import is_foreign as is_foreign
from mdiff.pipeline.inspection import loose as loose
from mdiff.pipeline.inspection import report as report
from mdiff.pipeline.inspection import summed as summed
from mdiff.pipeline.loading import CODEC_FOLDER as CODEC_FOLDER
from mdiff.pipeline.loading import load as load
from mdiff.pipeline.loading import load_modality as load_modality
from mdiff.pipeline.options import CallOptions as CallOptions
from mdiff.pipeline.options import SamplingOptions as SamplingOptions
from mdiff.pipeline.options import check_sampler as check_sampler
from mdiff.pipeline.pipeline import Pipeline as Pipeline
from mdiff.pipeline.saving import check_finite as check_finite
from mdiff.pipeline.saving import described_process as described_process
from mdiff.pipeline.saving import write_pipeline as write_pipeline
from mdiff.pipeline.scoring import Progress as Progress
from mdiff.pipeline.scoring import Rows as Rows
from mdiff.pipeline.scoring import bound_of_rows as bound_of_rows
from mdiff.pipeline.scoring import windows as windows

if TYPE_CHECKING:
    from mdiff.pipeline.conversion import convert as convert


def __getattr__(name: str) -> object:
    # Conversion imports the codecs of images, and these PIL: of no use to a model of text.
    if name == "convert":
        from mdiff.pipeline.conversion import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
