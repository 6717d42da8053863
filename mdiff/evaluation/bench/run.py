"""A run of `mdiff bench`: the machine, the law of both sides, and the rows."""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch

from mdiff.evaluation.bench.draw import draw_rows, gpu_rows
from mdiff.evaluation.bench.generation import REVISING, generation_rows, overhead_row, revising_row
from mdiff.evaluation.bench.laws import OURS, Law, Side, laws, sides
from mdiff.evaluation.bench.loss import loss_rows
from mdiff.evaluation.bench.timing import Row, Size, machine
from mdiff.ops import backend_name

SECTIONS = ("draw", "loss", "generation", "overhead")

METHOD = (
    "Both sides get the same logits, are warmed up and run in turns, in one process, on one "
    "thread; seconds are processor time. minimum: the other's least repeat over ours (of a "
    "generation, all of its steps over ours); median: the same of medians. mdiff works on the "
    "hidden rows, which it requests of the model, the others on all rows, as published; a row: the "
    "time of one row over that of one of ours."
)


class Bench:
    """A run: `environment` and `laws` first, then `rows` section by section.

    `size` sets the sizes, `say` gets a line of progress at a time. The baselines draw from
    torch's global generator, which is restored, as is the number of threads.
    """

    def __init__(self, size: Size, *, say: Callable[[str], None]) -> None:
        self.size, self.say = size, say
        self.found: dict[str, Side] = {}
        self.missing: list[str] = []
        self.laws: dict[str, Law] = {}

    def environment(self) -> dict[str, object]:
        """The machine with versions, the method and the sizes."""
        with one_thread():
            on = machine()
        for name in ("triton", "diffusers"):
            with suppress(PackageNotFoundError):
                on[name] = version(name)
            on.setdefault(name, None)
        on["platform"] = platform.platform()
        return {"machine": on, "method": METHOD, "size": asdict(self.size)}

    def check(self) -> list[Law]:
        """The law of every side that runs here."""
        with one_thread():
            # The generation draws by the backend that is chosen here.
            backends = tuple(dict.fromkeys((*OURS, backend_name())))
            self.found, self.missing = sides(ours=backends)
            self.laws = laws(self.found)
        return list(self.laws.values())

    def rows(self, sections: Sequence[str]) -> Iterator[Row]:
        """The rows of the sections, in the order of `SECTIONS`, each as soon as it is measured."""
        measure: dict[str, Callable[[], Iterator[Row]]] = {
            "draw": self._draw,
            "loss": lambda: loss_rows(self.size, self.say),
            "generation": lambda: generation_rows(self.size, self.laws, self.say),
            "overhead": self._overhead,
        }
        for name in (name for name in SECTIONS if name in sections):
            with one_thread():
                yield from measure[name]()

    def _overhead(self) -> Iterator[Row]:
        yield overhead_row(self.size, self.say)
        for name in REVISING:
            yield revising_row(self.size, name, self.say)

    def _draw(self) -> Iterator[Row]:
        for why in self.missing:
            yield Row("draw", "draw", note=f"not measured: {why}")
        yield from draw_rows(self.size, self.found, self.laws, self.say)
        if torch.cuda.is_available():
            yield from gpu_rows(self.size, self.say)


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch has one thread; that and its global generators are restored afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
