"""The rows of a step: a function of the seed and the step alone, on any number of machines."""

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from functools import lru_cache
from types import FrameType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mdiff.errors import ConfigError, DataError
from mdiff.kernels import philox
from mdiff.process_state import leave_with_parent
from mdiff.tokens import Batch, Examples
from mdiff.training.recipe import Train

# A part of a step's rows: their ids within the global batch (B,) int64, and the rows.
MicroBatch = tuple[Tensor, Batch]


# A step at the end of an epoch reads from two.
@lru_cache(maxsize=2)
def epoch_order(rows: int, *, epoch: int, seed: int) -> Tensor:
    """A permutation of the row numbers (rows,) int64, its own for each epoch.

    Rows are sorted by 63 random bits each, so that ties are practically impossible.

    >>> sorted(epoch_order(4, epoch=1, seed=0).tolist())
    [0, 1, 2, 3]
    """
    lane = philox.SHUFFLE << 24
    high, low, _, _ = philox.words(seed, torch.arange(rows), 0, epoch, lane)
    return ((high & 0x7FFFFFFF) << 32 | low).argsort(stable=True)


def rows_of_step(step: int, *, batch_size: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The row numbers and epochs, both (batch_size,) int64, that step 1, 2, ... reads.

    The epochs' permutations are concatenated and cut every `batch_size` rows: each row is read
    once an epoch, no row is dropped, and a step may span the end of an epoch.
    """
    position = torch.arange((step - 1) * batch_size, step * batch_size)
    epoch = position // rows
    row = torch.empty_like(position)
    for number in range(int(epoch[0]), int(epoch[-1]) + 1):
        here = epoch == number
        row[here] = epoch_order(rows, epoch=number, seed=seed)[position[here] % rows]
    return row, epoch


class StepRows(Dataset[list[MicroBatch]]):
    """The rows of each step that belong to one process, as its micro-batches.

    Process `rank` of `world` holds a run of batch_size / world rows, cut into micro-batches.
    ConfigError where the processes do not share the batch evenly.
    """

    def __init__(self, examples: Examples, *, train: Train, rank: int, world: int) -> None:
        if train.batch_size % world:
            raise ConfigError(
                f"train.batch_size={train.batch_size}: expected a multiple of {world} processes"
            )
        self.examples, self.train = examples, train
        share = train.batch_size // world
        self.samples = torch.arange(rank * share, (rank + 1) * share)

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """The row numbers and epochs of a step over all processes; see `rows_of_step`."""
        train = self.train
        return rows_of_step(
            step, batch_size=train.batch_size, rows=len(self.examples), seed=train.seed
        )

    def __getitem__(self, step: int) -> list[MicroBatch]:
        """The micro-batches of step 1, 2, ..."""
        row, epoch = self.rows(step)
        size = self.train.micro_batch or len(self.samples)
        return [
            (sample, self.examples.batch(row[sample], epoch[sample]))
            for sample in torch.split(self.samples, size)
        ]

    def steps(self, first: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of step `first` to the last, prepared by `train.workers` processes.

        They are started by a server of one thread: a fork of this process, which by now has
        several, may deadlock. A script that trains with workers needs the usual guard
        `if __name__ == "__main__"`.
        """
        if self.train.workers:
            multiprocessing.set_forkserver_preload(["mdiff.training.loader_server"])
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, self.train.steps + 1),
            num_workers=self.train.workers,
            collate_fn=list,
            multiprocessing_context="forkserver" if self.train.workers else None,
            worker_init_fn=_leave_signals_to_the_trainer,
            # The loader seeds its workers from a generator: not from the global one.
            generator=torch.Generator(),
        )
        try:
            yield from loader
        except RuntimeError as error:
            # An exception of a worker keeps its type; of a killed one torch has only this message.
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a process that prepares rows died ({str(error).splitlines()[0]}); the last "
                "checkpoint is intact: --resume auto goes on, train.workers=0 needs no such process"
            ) from error


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C and a launcher's SIGTERM go to every process; the current step needs its rows.

    SIGHUP is ignored, as in the server that started this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)
    # The trainer is the parent of their server, not theirs: torch watches the wrong process.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _end_next_time(number: int, frame: FrameType | None) -> None:
    """The first SIGTERM is for the whole process group, a second one for this process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
