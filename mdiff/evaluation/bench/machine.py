"""The machine of a measurement."""

import os
import platform
import re
from pathlib import Path

import torch

from mdiff import __version__

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def machine() -> dict[str, object]:
    """Processor, threads, GPU and versions."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name.*?:(.*)", info.read_text() if info.exists() else "", re.M)
    return {
        "cpu": named[1].strip() if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mdiff": __version__,
    }


def last_cache_bytes(caches: Path = CACHES) -> int | None:
    """The bytes of the largest cache that the first core reads through; None where unknown."""
    sizes = [path.read_text().strip() for path in caches.glob("index*/size")]
    known = [int(size[:-1]) * UNITS[size[-1]] for size in sizes if size[-1:] in UNITS]
    return max(known, default=None)
