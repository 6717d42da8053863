"""State of the whole process: what a call changes for a moment, and what it ends with."""

import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

# Seconds between looks whether the launcher still runs: a system call, on every system.
POLL = 0.5


class _Transformers:
    """The library of that name for one thread at a time, without its progress bars.

    It sets the default type of the whole process while it loads, its first import is not safe in
    several threads, and its bars are a setting of the process. May be entered again within.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.depth, self.shows_bars, self.hides_downloads = 0, False, False

    def __enter__(self) -> None:
        self.lock.acquire()
        self.depth += 1
        if self.depth > 1:
            return
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled
        from transformers import logging

        self.shows_bars = logging.is_progress_bar_enabled()
        self.hides_downloads = are_progress_bars_disabled()
        if self.shows_bars:
            logging.disable_progress_bar()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        from huggingface_hub.utils.tqdm import disable_progress_bars
        from transformers import logging

        self.depth -= 1
        if self.depth == 0 and self.shows_bars:
            # The Hub's bars too, which may have been off.
            logging.enable_progress_bar()
            if self.hides_downloads:
                disable_progress_bars()
        self.lock.release()


TRANSFORMERS = _Transformers()


@contextmanager
def kept_generators() -> Iterator[None]:
    """Afterwards the global generators of torch, numpy and Python are what they were before."""
    import numpy as np
    import torch

    # Those of callers, who may use numpy's old global generator.
    plain, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002


def leave_with_parent() -> None:
    """End this process when its parent has ended: another run may write its files by then."""
    import multiprocessing.connection

    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@cache
def leave_with_launcher() -> None:
    """End this process with the one of `accelerate launch` or torchrun that started it.

    The launcher starts its processes in sessions of their own: where it is killed, nothing else
    ends them, and they may wait for each other for ever.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_leave_orphaned, args=(os.getppid(),), daemon=True).start()


def _leave_orphaned(parent: int) -> None:
    """End this process when it has another parent."""
    while os.getppid() == parent:
        time.sleep(POLL)
    os._exit(1)
