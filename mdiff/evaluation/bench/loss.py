"""The loss, forward and backward, against logits of all rows: time, memory and gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdiff.evaluation.bench.timing import Row, Size, interleaved, times_faster
from mdiff.ops import masked_cross_entropy

TIME_TARGET, MEMORY_TARGET, GRADIENT_TARGET = 4.0, 8.0, 1e-6
BATCH = 4
# The label of a position that F.cross_entropy ignores.
IGNORED = -100

Loss = Callable[..., tuple[Tensor, Tensor]]


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The peak of bytes in tensors that exist at once, of those created within the mode.

    Every output of every operation of torch, forward and backward, as long as its storage exists;
    not the temporary memory of an operation, nor memory that torch did not allocate.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = WeakSet(each.untyped_storage() for each in known)
        self.live: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: Sequence[type], args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:  # fmt: skip
        """The operation's result; its storages are counted."""
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.untyped_storage() not in self.known:
                self.live[each.untyped_storage()] = each.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.live.values()))
        return made


class Problem:
    """Features of a batch, a head over V, targets, the hidden rows and their weights."""

    def __init__(self, rows: int, width: int, vocab: int) -> None:
        torch.manual_seed(0)
        shape = (BATCH, rows // BATCH)
        self.features = torch.randn(*shape, width, requires_grad=True)
        self.head = nn.Linear(width, vocab, bias=False)
        self.targets = torch.randint(vocab, shape)
        self.rows = (torch.randperm(rows) < rows // 2).view(shape)
        self.weights = torch.rand(shape) + 0.5

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors with gradients: the features and the head's matrix."""
        return self.features, self.head.weight

    def gradients(self, loss: Callable[[], Tensor]) -> list[Tensor]:
        """The gradients of the loss in `inputs`, by a forward and a backward."""
        for each in self.inputs:
            each.grad = None
        torch.autograd.backward(loss())
        return [each.grad for each in self.inputs if each.grad is not None]

    def plain(self) -> Tensor:
        """The loss as most code computes it: logits of all rows, some labels ignored."""
        logits = self.head(self.features).float().flatten(0, 1)
        labels = self.targets.masked_fill(~self.rows, IGNORED).flatten()
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return (nll * self.weights.flatten()).sum()

    def peak_bytes(self, loss: Callable[[], Tensor]) -> int:
        """The peak of bytes in a forward and backward, with gradients, without inputs."""
        with PeakBytes(*self.inputs, self.targets, self.rows, self.weights) as mode:
            self.gradients(loss)
        return int(mode.peak)


def loss_rows(
    size: Size, say: Callable[[str], None], kernel: Loss = masked_cross_entropy
) -> Iterator[Row]:
    """Times, memory and gradients of `ops.masked_cross_entropy`, half of the rows hidden."""
    say(f"loss, {size.rows} rows, V = {size.vocab:,}")
    case = Problem(size.rows, size.width, size.vocab)

    def ours() -> Tensor:
        given = case.features, case.head, case.targets
        return kernel(*given, rows=case.rows, weights=case.weights)[0]

    where = f"loss, V = {size.vocab:,}, d = {size.width}, {size.rows:,} rows"
    plain = "logits of all rows, then F.cross_entropy with ignore_index"
    truth = case.gradients(case.plain)
    errors = [
        float((mine - true).norm() / true.norm())
        for mine, true in zip(case.gradients(ours), truth, strict=True)
    ]
    del truth
    yield Row(
        "loss", f"{where}: gradients, relative error", max(errors), max(errors), unit="",
        target=GRADIENT_TARGET, at_least=False,
        detail={"features": errors[0], "head": errors[1], "other": plain},
    )  # fmt: skip
    used, others = case.peak_bytes(ours), case.peak_bytes(case.plain)
    yield Row(
        "loss", f"{where}: peak memory against all rows", others / used, others / used,
        target=MEMORY_TARGET,
        detail={
            "measured": "peak of bytes in tensors, with gradients, without inputs",
            "mdiff": {"bytes": used}, "other": {"bytes": others, "name": plain},
        },
    )  # fmt: skip
    timings = interleaved(
        {"ours": lambda: case.gradients(ours), "plain": lambda: case.gradients(case.plain)},
        repeats=size.loss_repeats,
    )
    yield times_faster(
        "loss", f"{where}: time against all rows", timings["ours"], timings["plain"],
        rows=(int(case.rows.sum()), size.rows), target=TIME_TARGET, baseline=plain,
    )  # fmt: skip
