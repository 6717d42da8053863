"""The processes of a run, by accelerate: each has the whole model (DDP) or a shard (FSDP2)."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import get_int_from_env, patch_environment

from mdiff.errors import BackendError, ConfigError, MdiffError
from mdiff.process_state import leave_with_launcher

# How launchers count processes, and where these meet.
WORLDS = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
MEETING = ("MASTER_ADDR", "MASTER_PORT")
SHARDED = "accelerate launch --config_file configs/accelerate/fsdp2.yaml"


def started() -> Accelerator:
    """The Accelerator of this process, as the launcher set it up; the process ends with it.

    Raises ConfigError for engines other than DDP and FSDP2, BackendError where the processes
    cannot find each other.
    """
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked_for(engine):
            raise ConfigError(
                f"ACCELERATE_USE_{engine}=true: expected FSDP2 for a sharded model: {SHARDED}"
            )
    leave_with_launcher()
    plugin = None
    if _asked_for("FSDP"):
        # Weights are every process's own, by the seed. accelerate's launcher would have the first
        # process send them to the others by default, which unties tied ones.
        plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
        if plugin.fsdp_version != 2:
            raise ConfigError(f"fsdp_version={plugin.fsdp_version}: expected 2: {SHARDED}")
    # With `cpu` set, processes without a GPU find each other under any launcher (by gloo).
    with _joining():
        made = Accelerator(
            mixed_precision="no", cpu=not torch.accelerator.is_available(), fsdp_plugin=plugin
        )
    if plugin is not None and made.distributed_type == DistributedType.MULTI_CPU:
        # accelerate shards on GPUs alone, and would replicate the model here; torch can do both.
        made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
    # A launcher's file may set it; the recipe's micro-batches are the only accumulation here.
    made.gradient_accumulation_steps = 1
    return made


@contextmanager
def _joining() -> Iterator[None]:
    """To join the processes of a launcher in; a process that is the only one joins none.

    Job scripts and notebooks name a rank and a world of one, without an address to meet at.
    Raises ConfigError where a launcher's rank is no number below its count of processes.
    """
    try:
        rank, world = (int(os.environ.get(*name)) for name in (("RANK", "0"), ("WORLD_SIZE", "1")))
    except ValueError:
        raise ConfigError("RANK and WORLD_SIZE: expected whole numbers") from None
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={world}: expected less of both")
    missing = [name for name in MEETING if not os.environ.get(name)]
    try:
        alone = get_int_from_env(WORLDS, 1) == 1 and bool(missing)
        # As accelerate marks a process without a launcher.
        with patch_environment(LOCAL_RANK=-1) if alone else nullcontext():
            yield
    except (ValueError, RuntimeError) as error:
        if isinstance(error, MdiffError) or not any(map(os.environ.get, (*WORLDS, "LOCAL_RANK"))):
            raise
        given = ", ".join(f"{name}={os.environ[name]}" for name in WORLDS if name in os.environ)
        lack = f"; the environment lacks {' and '.join(missing)}" if missing else ""
        raise BackendError(
            f"the processes of a launcher ({given}) cannot find each other{lack}: {error}"
        ) from error


def _asked_for(engine: str) -> bool:
    """Whether a launcher started this process for an engine of accelerate."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on the main process while the others wait; where it fails, all fail."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as caught:
            error = caught
    failed = torch.tensor([float(error is not None)], device=accelerator.device)
    failures = float(accelerator.reduce(failed, "sum"))
    if error is not None:
        raise error
    if failures:
        raise MdiffError("the main process failed; its message says why")


def on_main_says(accelerator: Accelerator, answer: bool) -> bool:
    """The answer of the main process, in every process."""
    own = torch.tensor([float(answer and accelerator.is_main_process)], device=accelerator.device)
    return float(accelerator.reduce(own, "sum")) > 0


def is_main_process() -> bool:
    """Whether this process is the one that writes and prints."""
    return bool(PartialState().is_main_process)
