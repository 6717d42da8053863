"""Generate discrete tokens, text and images alike, by masked diffusion.

Nothing heavy is imported here: each public name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdiff.denoiser import Denoiser as Denoiser
    from mdiff.denoiser import from_logits as from_logits
    from mdiff.denoiser import guided as guided
    from mdiff.errors import BackendError as BackendError
    from mdiff.errors import CheckpointError as CheckpointError
    from mdiff.errors import ConfigError as ConfigError
    from mdiff.errors import DataError as DataError
    from mdiff.errors import MdiffError as MdiffError
    from mdiff.modalities.image import load_codec as load_codec
    from mdiff.objective import Bound as Bound
    from mdiff.objective import Loss as Loss
    from mdiff.objective import corrupt as corrupt
    from mdiff.objective import diffusion_loss as diffusion_loss
    from mdiff.objective import masked_diffusion_loss as masked_diffusion_loss
    from mdiff.objective import nll_bound as nll_bound
    from mdiff.objective import token_nll as token_nll
    from mdiff.ops import Draw as Draw
    from mdiff.ops import draw as draw
    from mdiff.pipeline import Pipeline as Pipeline
    from mdiff.pipeline import load as load
    from mdiff.process import Logistic as Logistic
    from mdiff.process import Masking as Masking
    from mdiff.process import Mixed as Mixed
    from mdiff.process import Process as Process
    from mdiff.process import Uniform as Uniform
    from mdiff.sampling import Sample as Sample
    from mdiff.sampling import State as State
    from mdiff.sampling import sample as sample
    from mdiff.schedule import Arccos as Arccos
    from mdiff.schedule import Cosine as Cosine
    from mdiff.schedule import Exponential as Exponential
    from mdiff.schedule import Geometric as Geometric
    from mdiff.schedule import Linear as Linear
    from mdiff.schedule import Polynomial as Polynomial
    from mdiff.schedule import Schedule as Schedule
    from mdiff.tokens import TokenSpace as TokenSpace

__version__ = "0.1.0"

_ROOM = {
    "denoiser": ("Denoiser", "from_logits", "guided"),
    "errors": ("BackendError", "CheckpointError", "ConfigError", "DataError", "MdiffError"),
    "modalities.image": ("load_codec",),
    "objective": (
        "Bound", "Loss", "corrupt", "diffusion_loss", "masked_diffusion_loss", "nll_bound",
        "token_nll",
    ),
    "ops": ("Draw", "draw"),
    "pipeline": ("Pipeline", "load"),
    "process": ("Logistic", "Masking", "Mixed", "Process", "Uniform"),
    "sampling": ("Sample", "State", "sample"),
    "schedule": (
        "Arccos", "Cosine", "Exponential", "Geometric", "Linear", "Polynomial", "Schedule",
    ),
    "tokens": ("TokenSpace",),
}  # fmt: skip
_MODULE = {name: module for module, names in _ROOM.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'mdiff' has no attribute {name!r}")
    value = getattr(import_module(f"mdiff.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
