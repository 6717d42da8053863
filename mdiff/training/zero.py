"""ZeRO-3: DeepSpeed's engine behind what training asks of an Accelerator (Rajbhandari et al. 2020).

Each process keeps an equal slice of every parameter, of its gradient and of its optimiser's
state, in float32: the flat tensor, padded at its end, cut into as many pieces as there are
processes. Parameters are whole only while a layer that reads them runs.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import patch_environment
from torch import Tensor, nn

from mdiff.errors import BackendError, ConfigError
from mdiff.training.recipe import Train
from mdiff.training.zero_slices import Joined, ZeroPlacement, flats_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FILE = "configs/accelerate/zero3.yaml"
# What accelerate's launcher sets, and accelerate reads.
ASKED = "ACCELERATE_USE_DEEPSPEED"


def zero_was_asked_for() -> bool:
    """Whether a launcher started this process for DeepSpeed."""
    return os.environ.get(ASKED, "false").lower() == "true"


def deepspeed() -> ModuleType:
    """The package; BackendError where it is not installed."""
    with quiet():
        try:
            import deepspeed as package
        except ImportError as error:
            raise BackendError(
                f"deepspeed is not installed ({error}): pip install 'mdiff-toolkit[deepspeed]', or "
                "cut the model with configs/accelerate/fsdp2.yaml, which needs no other package"
            ) from None
    # Names of collectives that it uses and torch is renaming, said at every step.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    return cast(ModuleType, package)


def quiet() -> contextlib.AbstractContextManager[object]:
    """Within it, and in loggers that are made in it, what goes to stdout goes to stderr.

    stdout carries results here, and DeepSpeed prints and logs there.
    """
    return contextlib.redirect_stdout(sys.stderr)


def checked(settings: dict[str, Any]) -> dict[str, object]:
    """DeepSpeed's settings as a launcher gives them, with what training decides filled in.

    ConfigError where they ask for another stage, for offloading or for DeepSpeed's own
    precision, accumulation, clipping, optimiser or rates: those are the recipe's.
    """
    zero = settings.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise ConfigError(f"DeepSpeed with zero_stage={zero.get('stage')}: expected 3, as {FILE}")
    for kind in ("offload_optimizer", "offload_param"):
        device = (zero.get(kind) or {}).get("device", "none")
        if device not in (None, "none"):
            raise ConfigError(f"DeepSpeed with {kind} to {device!r}: expected none, as {FILE}")
    for kind in ("fp16", "bf16"):
        if (settings.get(kind) or {}).get("enabled") is True:
            raise ConfigError(f"DeepSpeed with {kind}: expected none, the recipe's train.precision")
    for kind in ("optimizer", "scheduler"):
        if kind in settings:
            raise ConfigError(f"DeepSpeed with its own {kind}: expected none, the recipe's optim")
    for key, value in (("gradient_accumulation_steps", 1), ("gradient_clipping", 0.0)):
        if settings.get(key, "auto") not in ("auto", value):
            raise ConfigError(f"DeepSpeed with {key}={settings[key]}: expected none, the recipe's")
    own: dict[str, object] = {
        # Training gives out rows and divides by their tokens: any size will do here.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        # Our optimisers are torch's, or act on a slice as on a whole.
        "zero_allow_untested_optimizer": True,
    }
    replaced = {"train_batch_size", "fp16", "bf16"}
    return {key: value for key, value in settings.items() if key not in replaced} | own


def refuse(settings: Train) -> None:
    """Raise ConfigError for settings of a recipe that this engine does not support."""
    if settings.precision == "fp64":
        raise ConfigError(
            "train.precision='fp64': DeepSpeed keeps weights in float32; expected 'fp32' or "
            "'bf16', or configs/accelerate/fsdp2.yaml"
        )
    if settings.compile:
        raise ConfigError(
            "train.compile=true: compiled code does not use the weights that DeepSpeed gathers; "
            "expected false, or configs/accelerate/fsdp2.yaml"
        )


class ZeroAccelerator(Accelerator):  # type: ignore[misc]
    """An Accelerator whose model and optimisers are DeepSpeed's engine.

    accelerate starts the processes, reads the launcher's file and talks between processes; the
    engine is called here. The gradient is complete, and its norm known, before a step is taken,
    so that training decides on the step as it does elsewhere.
    """

    def __init__(self, *, mixed_precision: str, cpu: bool) -> None:
        self.package = deepspeed()
        self.settings = checked(DeepSpeedPlugin().deepspeed_config)
        # With this variable set, accelerate would step within `backward` and have transformers
        # cut models while they are built; and it supports DeepSpeed on GPUs alone.
        with patch_environment(**{ASKED: "false"}):
            super().__init__(mixed_precision=mixed_precision, cpu=cpu)
        self.engine: DeepSpeedEngine = None

    def prepare(
        self, model: nn.Module, *optimizers: torch.optim.Optimizer
    ) -> tuple[DeepSpeedEngine, EngineStep]:
        """The engine, which is called as the model is, and one optimiser with all groups."""
        joined = Joined(optimizers)
        with quiet():
            # It joins the process group that is there.
            self.package.init_distributed(auto_mpi_discovery=False)
            # Cut from the CPU, one parameter at a time: no device ever holds them all.
            self.package.zero.Init(module=model, config_dict_or_path=self.settings)
            model.to(self.device)
            self.engine, *_ = self.package.initialize(
                model=model, optimizer=joined, config=self.settings, dist_init_required=False
            )
        joined.flats += flats_of(self.engine.optimizer)
        return self.engine, EngineStep(self)

    def placement(self, model: nn.Module) -> ZeroPlacement:
        """Where the engine put the parameters of `model`, a part of what was prepared."""
        return ZeroPlacement(model, self.engine.optimizer.optimizer, self.package)

    def unwrap_model(self, model: DeepSpeedEngine, *args: object, **kwargs: object) -> nn.Module:
        """The module inside the engine."""
        return cast(nn.Module, model.module if model is self.engine else model)

    @contextlib.contextmanager
    def no_sync(self, model: object) -> Iterator[None]:
        """Within it the gradients of a micro-batch are added up, with others to come."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, **kwargs: object) -> None:
        """Add the gradient of a loss, averaged over processes, to this process's slices."""
        self.engine.backward(loss)

    def clip_grad_norm_(
        self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2
    ) -> Tensor:
        """The norm of the whole gradient, which the step scales down to `max_norm`."""
        squares = torch.stack([g.double().square().sum() for g in self.gradients(parameters)])
        # The engine divides by (norm + 1e-6) / clip where that is above 1, as torch does.
        self.engine.optimizer.clip_grad = max_norm if math.isfinite(max_norm) else 0.0
        return cast(Tensor, self.reduce(squares.sum(), "sum")).sqrt()

    def gradients(self, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
        """The slices of the gradients on this process, which may be written to in place."""
        local = self.package.utils.safe_get_local_grad
        return [local(parameter) for parameter in parameters if parameter.requires_grad]

    def free_memory(self, *objects: object) -> object:
        """Release the engine, with its hooks and buffers."""
        if self.engine is not None:
            self.engine.destroy()
            self.engine = None
        return super().free_memory(*objects)


class EngineStep:
    """The optimiser of training: the groups of all, and the engine's one step."""

    def __init__(self, accelerator: ZeroAccelerator) -> None:
        self.accelerator = accelerator
        self.param_groups = accelerator.engine.optimizer.param_groups

    def step(self) -> None:
        """Update this process's slices; BackendError where the engine leaves the step out."""
        engine = self.accelerator.engine
        engine.step()
        if not engine.was_step_applied():
            raise BackendError("DeepSpeed left out a step with a finite gradient: it overflowed")

    def zero_grad(self) -> None:
        """Forget the gradients, whether a step was taken or not."""
        engine = self.accelerator.engine
        engine.optimizer.zero_grad()
        # A parameter that the next step does not reach would keep this step's gradient.
        for gradient in self.accelerator.gradients(engine.module.parameters()):
            gradient.zero_()
