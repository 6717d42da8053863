"""The threads of the `mdiff` command: no more than the process may use, and none that spins.

OpenMP's threads spin while they wait for work: beside other busy processes two of them use up to
three times the processor time of one. The command lets them sleep instead, unless the user has
chosen; `import mdiff` changes nothing.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

# Variables by which a user chooses how threads wait, and how many there are.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Parameters of a model for which another thread is faster than its start in each operation.
PARAMETERS_A_THREAD = 4_000_000

_counts_here = False


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what the user has not set; OpenMP reads it when torch is loaded."""
    global _counts_here
    if not any(name in environ for name in WAITING):
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
    _counts_here = not any(name in environ for name in COUNTS)
    if _counts_here and usable_cpus() < _affinity():
        environ["OMP_NUM_THREADS"] = str(usable_cpus())


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may use: its affinity, and the quota of its control groups.

    `root` holds proc/ and sys/. A quota counts in whole CPUs, at least one.
    """
    allowed = float(_affinity())
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controllers and "cpu")
        folder = base / path.lstrip("/")
        # Each group above has a quota of its own. In a container the path may lie outside.
        for group in (folder, *folder.parents):
            if group.is_relative_to(base):
                allowed = min(allowed, _quota(group))
    return max(1, int(allowed))


def _affinity() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Only Linux has it.
        return os.cpu_count() or 1


def _quota(group: Path) -> float:
    """CPUs a control group may use, infinite without a quota: of version 2, else of version 1."""
    try:
        if (limit := group / "cpu.max").exists():
            most, period = limit.read_text().split()
        else:
            most, period = (
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return float("inf") if most in ("max", "-1") else int(most) / int(period)
    except (OSError, ValueError):
        return float("inf")


def fit_threads(denoiser: object) -> None:
    """Let torch use no more threads than a model of this size pays for, unless the user chose."""
    import torch

    if _counts_here and isinstance(denoiser, torch.nn.Module):
        size = sum(parameter.numel() for parameter in denoiser.parameters())
        pays = max(1, -(-size // PARAMETERS_A_THREAD))
        torch.set_num_threads(min(torch.get_num_threads(), pays))
