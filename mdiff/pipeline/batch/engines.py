"""Engines: the processes that make items, whatever they are.

An item is made by one call in a worker that has a model or codec of its own. A worker that crashes
is an exception in the item's future, one of the engine's `crashes`; what the call itself raises is
a result, `Raised`. `runner` decides what then becomes of the item.
"""

import multiprocessing
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import c_bool
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from mdiff.errors import MdiffError
from mdiff.process_state import leave_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
Given = TypeVar("Given", contravariant=True)
Made = TypeVar("Made", covariant=True)

# So many workers may crash at an item: one may be an accident, several are its doing.
ATTEMPTS = 3
# Seconds that workers have to end by themselves.
GRACE = 10.0


class Maker(Protocol[Given, Made]):
    """Opens the function that makes items; pickled, and sent to each worker."""

    @property
    def gpus(self) -> int:
        """How many GPUs a worker needs."""

    def open(self, worker: int) -> Callable[[Given], Made]:
        """Load the model or the codec, in the worker of that number."""


@dataclass(frozen=True)
class Raised:
    """What making an item raised."""

    error: Exception


class Engine(Protocol[Given, Result]):
    """Makes `workers` items at once.

    Where `together`, a crash ends all items that are being made, whichever caused it.
    """

    workers: int
    together: bool
    crashes: tuple[type[Exception], ...]

    def submit(self, item: Given) -> Future[Result | Raised]:
        """Have an item made."""

    def kill(self, future: Future[Result | Raised] | None = None) -> None:
        """End the worker of an item, which counts as a crash; without one, all workers."""

    def recover(self, crash: BaseException) -> str:
        """Make ready for more items after a crash; returns how the worker ended."""

    def close(self) -> None:
        """End the workers, which have nothing to do."""


class InProcess(Generic[Item, Result]):
    """Makes items in this process, one after the other; what one raises is raised at once."""

    workers, together = 1, False
    crashes: tuple[type[Exception], ...] = ()

    def __init__(self, make: Callable[[Item], Result]) -> None:
        self.make = make

    def submit(self, item: Item) -> Future[Result | Raised]:
        """Make it."""
        future: Future[Result | Raised] = Future()
        with one_thread():
            future.set_result(self.make(item))
        return future

    def kill(self, future: Future[Result | Raised] | None = None) -> None:
        """There is no other process."""

    def recover(self, crash: BaseException) -> str:
        """Raises the crash: there is no other process that could go on."""
        raise crash

    def close(self) -> None:
        """There is no other process."""


class Pool(Generic[Item, Result]):
    """Worker processes of one thread on this machine; a process starts when an item needs it."""

    together = True
    crashes: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __init__(self, maker: Maker[Item, Result], workers: int) -> None:
        self.maker, self.workers = maker, workers
        # Pools in a row that crashed before a worker had loaded its model.
        self.unopened = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Without a lock, which a worker that is killed could hold for ever.
        self.opened = context.RawValue(c_bool, False)
        self.executor = ProcessPoolExecutor(
            self.workers, context, initializer=_begin, initargs=(self.maker, self.opened)
        )
        # The executor fills it, and lets go of it when it ends.
        self.processes = self.executor._processes

    def submit(self, item: Item) -> Future[Result | Raised]:
        """Queue it; in a pool that has just crashed, a future with the crash."""
        try:
            return self.executor.submit(_attempt, item)
        except BrokenProcessPool as crash:
            future: Future[Result | Raised] = Future()
            future.set_exception(crash)
            return future

    def kill(self, future: Future[Result | Raised] | None = None) -> None:
        """Kill all workers: the executor does not tell whose the item is."""
        for process in list(self.processes.values()):
            process.kill()

    def recover(self, crash: BaseException) -> str:
        """Start a new pool; MdiffError where workers keep crashing before they have a model."""
        self.close()
        codes = [process.exitcode or 0 for process in self.processes.values()]
        # The executor terminates the other workers by SIGTERM.
        how = _ending(next((code for code in codes if code not in (0, -signal.SIGTERM)), -15))
        self.unopened = 0 if self.opened.value else self.unopened + 1
        if self.unopened == ATTEMPTS:
            raise MdiffError(f"{ATTEMPTS} workers crashed before a shard, the last by {how}")
        self._start()
        return how

    def close(self) -> None:
        """Wait for the workers to end; those that do not are killed."""
        late = threading.Timer(GRACE, self.kill)
        late.daemon = True
        late.start()
        try:
            self.executor.shutdown()
        finally:
            late.cancel()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: with more, the last bits of a product depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ending(code: int) -> str:
    """How a process ended."""
    if code == -signal.SIGKILL:
        return f"signal {-code} (the system kills so where memory runs out)"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


class Worker(Generic[Item, Result]):
    """What a worker process holds: the function that `maker` opened, or the error of opening."""

    def __init__(self, maker: Maker[Item, Result], number: int) -> None:
        torch.set_num_threads(1)
        self.failed: Raised | None = None
        try:
            self.make = maker.open(number)
        except Exception as error:
            self.failed = Raised(portable(error))

    def attempt(self, item: Item) -> Result | Raised:
        """Make an item; an error is returned, so that only a crash is an exception."""
        if self.failed is not None:
            return self.failed
        try:
            return self.make(item)
        except Exception as error:
            return Raised(portable(error))


# The worker of this process, by the run that it belongs to.
_held: dict[str, Worker[Any, Any]] = {}


def worker_of(run: str, maker: Maker[Item, Result], number: int) -> Worker[Item, Result]:
    """The worker of this process for a run; it is opened at the first call."""
    if run not in _held:
        _held.clear()
        _held[run] = Worker(maker, number)
    return _held[run]


def _begin(maker: Maker[Item, Result], opened: c_bool) -> None:
    """Set up a worker process of a pool."""
    # An interrupt is for the parent to answer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    # A process is named after its number among its parent's children, as SpawnProcess-1:2.
    number = re.split("[-:]", multiprocessing.current_process().name)[-1]
    worker_of("", maker, int(number))
    opened.value = True


def _attempt(item: Any) -> Any:
    """Make an item in a worker process of a pool."""
    return _held[""].attempt(item)


def portable(error: Exception) -> Exception:
    """The error as it can be sent to another process, still of a kind with its exit code."""
    if isinstance(error, MdiffError | MemoryError):
        return error
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename)
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return MemoryError(str(error))
    return MdiffError(f"{type(error).__name__}: {error}")
