"""The engine of several machines: Ray Core, on a cluster or on one that it starts here."""

import logging
import os
import re
import socket
from concurrent.futures import Future
from importlib import import_module
from types import ModuleType
from typing import Generic
from uuid import uuid4

from mdiff.errors import BackendError, ConfigError
from mdiff.pipeline.batch.engines import ATTEMPTS, Item, Maker, Raised, Result, worker_of

# Seconds for a first connection; Ray itself tries for many minutes.
CONNECT_WITHIN = 10.0


class RayEngine(Generic[Item, Result]):
    """Tasks of one CPU core each, `workers` at once, by default one a core of the cluster.

    Each process that Ray runs them in loads the model once. BackendError where Ray is not
    installed, or no cluster answers that could run them.
    """

    together = False

    def __init__(
        self, maker: Maker[Item, Result], workers: int | None, address: str | None = None
    ) -> None:
        # What is empty is refused, as any other address that is none.
        address = os.environ.get("RAY_ADDRESS") if address is None else address
        self.ray = ray = _imported(joins=address not in (None, "local"))
        # What Ray does not raise of a task is a crash of its process or of its machine.
        self.crashes: tuple[type[Exception], ...] = (ray.exceptions.RayError,)
        self.wanted, self.gpus = workers, maker.gpus
        self.started = not ray.is_initialized()
        if self.started:
            _connect(ray, address, workers)
        options = {"num_cpus": 1, "num_gpus": maker.gpus, "max_retries": 0}
        task = ray.remote(_attempt)
        self.task = task.options(**options)
        self.maker, self.run = ray.put(maker), uuid4().hex
        self.references: dict[Future[Result | Raised], object] = {}
        self._count_workers()
        try:
            opening = task.options(**options | {"max_retries": ATTEMPTS - 1})
            ray.get(opening.remote(self.maker, self.run))
        except ray.exceptions.RayError as crash:
            self.close()
            raise BackendError(f"the cluster cannot run mdiff: {_line(crash)}") from None

    def _count_workers(self) -> None:
        """Set how many tasks the cluster can run now: machines may have left it."""
        there = self.ray.cluster_resources()
        most = int(min(there.get("CPU", 0), there.get("GPU", 0) if self.gpus else 2**31))
        if most < 1:
            raise BackendError("the cluster has no GPU: give --device cpu")
        self.workers = min(most, self.wanted or most)

    def submit(self, item: Item) -> Future[Result | Raised]:
        """Give it to the cluster."""
        reference = self.task.remote(self.maker, self.run, item)
        future: Future[Result | Raised] = reference.future()
        self.references[future] = reference
        future.add_done_callback(lambda done: self.references.pop(done, None))
        return future

    def kill(self, future: Future[Result | Raised] | None = None) -> None:
        """Cancel a task, or all, by killing its process."""
        wanted = list(self.references) if future is None else [future]
        for each in wanted:
            if (reference := self.references.get(each)) is not None:
                self.ray.cancel(reference, force=True)

    def recover(self, crash: BaseException) -> str:
        """Count the workers again; Ray itself starts new processes."""
        if isinstance(crash, self.ray.exceptions.RayTaskError):
            raise BackendError(f"the cluster cannot run mdiff: {_line(crash)}") from None
        self._count_workers()
        return f"{type(crash).__name__} of Ray"

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.started:
            self.ray.shutdown()


def _imported(*, joins: bool) -> ModuleType:
    # Ray reports its use to its makers unless this is set.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if joins:
        # Attempts of 40 s at a server that is no cluster; Ray makes 20.
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        ray = import_module("ray")
        import_module("ray.exceptions")
    except ImportError as error:
        raise BackendError(
            f"--engine ray: ray is not installed ({error}); pip install 'mdiff-toolkit[ray]'"
        ) from None
    return ray


def _connect(ray: ModuleType, address: str | None, workers: int | None) -> None:
    """Join the cluster of an address, or start one on this machine."""
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None or address == "local":
        local = {"num_cpus": workers, "include_dashboard": False}
        ray.init(address="local", **options, **local)
        return
    where = re.fullmatch(r"([^:/]+):([0-9]{1,5})", address)
    if where is None and address != "auto":
        raise ConfigError(f"--address {address}: expected HOST:PORT, auto or local")
    try:
        if where is not None:
            socket.create_connection((where[1], int(where[2])), CONNECT_WITHIN).close()
        ray.init(address=address, **options)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise BackendError(f"no Ray cluster answers at {address}: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """The last line of a message: that of a task begins with its traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _attempt(maker: Maker[Item, Result], run: str, *items: Item) -> object:
    """Make an item in a process of Ray; without one, only load the model."""
    worker = worker_of(run, maker, 0)
    return worker.attempt(items[0]) if items else None
