"""The hot loops behind one switch: the same function whichever backend runs it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.errors import BackendError, ConfigError, nearest
from mdiff.kernels.draw_c import LIBRARY, WHY_NOT, draw_c
from mdiff.kernels.draw_torch import draw_torch
from mdiff.kernels.draw_triton import draw_triton
from mdiff.kernels.draw_triton import why_not as triton_why_not
from mdiff.kernels.loss import CrossEntropy, chunked_cross_entropy
from mdiff.kernels.loss_heads import wide_of
from mdiff.kernels.reference import Draw as Draw
from mdiff.kernels.reference import draw_reference
from mdiff.kernels.reveal_torch import Revealed as Revealed
from mdiff.kernels.reveal_torch import reveal_torch
from mdiff.kernels.reveal_triton import reveal_triton

# The backends that run on the CPU here, and the others with why they do not. triton runs on
# CUDA; on the CPU only in its interpreter, when it is asked for.
BACKENDS: dict[str, Callable[..., Draw]] = {"reference": draw_reference, "torch": draw_torch}
MISSING: dict[str, str] = {}
if LIBRARY is None:
    MISSING["c"] = WHY_NOT
else:
    BACKENDS["c"] = draw_c
REVEALS: dict[str, Callable[..., Revealed]] = {"torch": reveal_torch, "triton": reveal_triton}
# Logits that exist at once in `of_features`: 16 MB of float32 on a CPU, 512 MB elsewhere.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}


def backend_name(name: str | None = None, *, device: str = "cpu") -> str:
    """The backend that runs on that type of device: the argument, else MDIFF_BACKEND, else its own.

    Its own is c on the CPU and triton on CUDA, where they are here, else torch. One that is
    asked for and missing, or that does not run there, is a BackendError, never a silent other.
    """
    chosen = name or os.environ.get("MDIFF_BACKEND")
    if not chosen:
        if device == "cuda":
            return "torch" if triton_why_not(device) else "triton"
        return "c" if device == "cpu" and "c" in BACKENDS else "torch"
    if chosen == "triton":
        why = triton_why_not(device)
        if why:
            raise BackendError(f"backend 'triton' is not here: {why}")
        return chosen
    if chosen in MISSING:
        raise BackendError(f"backend {chosen!r} is not here: {MISSING[chosen]}")
    if chosen not in BACKENDS:
        known = [*BACKENDS, "triton"]
        raise BackendError(f"backend {chosen!r} is not here; {nearest(chosen, known)}")
    if chosen == "c" and device != "cpu":
        raise BackendError(f"backend 'c' runs on the CPU; the logits are on {device}")
    return chosen


def _backend(name: str) -> Callable[..., Draw]:
    return draw_triton if name == "triton" else BACKENDS[name]


def draw(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sample: int | Tensor | None = None,
    step: int | Tensor = 0,
    position: int | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    never: tuple[int, ...] = (),
    span: tuple[int, int] | Tensor | None = None,
    measure: str = "model",
    unconditional: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Draw:
    """One id for each row of `logits` (N, V), with its figures from the same pass.

    The id is drawn from softmax(logits / temperature) after top_k, top_p and min_p, by the
    tile reservoir of `kernels/reference.py`; temperature 0 takes the lowest id of the
    maximum. `seed`, `sample`, `step`, `position` are ints or (N,) int64 and name the random
    stream; with neither sample nor position, position is the row number. `never` ids have
    probability zero. `span` (first, stop), or (N, 2) int64, are the only ids a row may draw.

    `log_prob` (of the id), `entropy` and `margin` (p1 - p2) are nats of the logits without
    forbidden ids, at temperature 1 and before the filters; measure="drawn" takes them after
    both, temperature 0 counting as 1. In float32, or float64 for float64 logits. A row with
    NaN or +inf, or with no finite permitted logit, draws the lowest permitted id with NaN.

    With `unconditional` (N, V), of the same type, the logits of a row are u + s (c - u), `logits`
    being c and s `guidance_scale`, a number or (N,): classifier-free guidance (Ho & Salimans
    2022) without a third array. Where s is 1 they are c.

    `backend` is one of BACKENDS (see `backend_name`); they differ at near-ties of rounding only.
    c and triton hand over to torch what their `by_torch` names: float64 logits, and triton a
    top_k above 64.

    Raises ConfigError for options out of range, BackendError for a backend that is not here.

    >>> draw(torch.tensor([[0.0, 9.0]]), seed=1, temperature=0).tokens.tolist()
    [1]
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ConfigError(f"logits {tuple(logits.shape)} {logits.dtype}: expected (N, V) floats")
    rows, device = logits.shape[0], logits.device
    settled = drawing(
        logits.shape[1], device=device.type, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, never=never, measure=measure, backend=backend,
    )  # fmt: skip
    scale = None
    if unconditional is None and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
        raise ConfigError("guidance_scale without unconditional logits has no effect")
    if unconditional is not None:
        if not isinstance(guidance_scale, Tensor) and not math.isfinite(guidance_scale):
            raise ConfigError(f"guidance_scale={guidance_scale}: expected a finite number")
        if unconditional.shape != logits.shape or unconditional.dtype != logits.dtype:
            raise ConfigError(
                f"unconditional {tuple(unconditional.shape)} {unconditional.dtype}: expected "
                f"{tuple(logits.shape)} {logits.dtype}, as the logits"
            )
        scale = torch.as_tensor(guidance_scale, dtype=torch.float64, device=device).expand(rows)
    if sample is None and position is None:
        position = torch.arange(rows, device=device)
    return settled(
        logits,
        seed=_per_row(seed, rows, device),
        sample=_per_row(0 if sample is None else sample, rows, device),
        step=_per_row(step, rows, device),
        position=_per_row(0 if position is None else position, rows, device),
        span=_span(span, rows, device, logits.shape[1]),
        unconditional=unconditional,
        scale=scale,
    )


@dataclass(frozen=True)
class Drawing:
    """A backend with the options of `draw` settled: what a sampler calls at every step."""

    run: Callable[..., Draw]
    vocab_size: int
    options: dict[str, Any]

    def __call__(self, logits: Tensor, **row: Any) -> Draw:
        """`draw` of logits (N, V); `row` are the arguments of a backend that differ by row.

        `seed`, `sample`, `step`, `position` (N,) int64; `span` (N, 2) or None;
        `unconditional` (N, V) and `scale` (N,) float64, or None.
        """
        if logits.dim() != 2 or logits.shape[1] != self.vocab_size:
            raise ConfigError(
                f"the denoiser gave logits {tuple(logits.shape)}; "
                f"the space has {self.vocab_size} ids"
            )
        return self.run(logits, **self.options, **row)

    def of_features(
        self, features: Tensor, head: Callable[[Tensor], Tensor], *,
        unconditional: Tensor | None = None, **row: Tensor | None,
    ) -> Draw:  # fmt: skip
        """The same of the logits that `head` makes of `features` (N, D), not all at once.

        The head runs on as many rows at a time as have CHUNK[device] logits: on a CPU they are
        drawn from while they lie in its last cache. `unconditional` (N, D) are the features of
        the other branch.
        """
        most = CHUNK.get(features.device.type, CHUNK["cuda"])
        size = max(1, most // self.vocab_size)
        if len(features) <= size:
            other = None if unconditional is None else head(unconditional)
            return self(head(features), unconditional=other, **row)
        drawn = []
        for first in range(0, len(features), size):
            part = slice(first, first + size)
            own = {name: None if each is None else each[part] for name, each in row.items()}
            other = None if unconditional is None else head(unconditional[part])
            drawn.append(self(head(features[part]), unconditional=other, **own))
        return Draw(*(torch.cat(field) for field in zip(*drawn)))


def drawing(
    vocab_size: int,
    *,
    device: str = "cpu",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    never: tuple[int, ...] = (),
    measure: str = "model",
    backend: str | None = None,
) -> Drawing:
    """The options of `draw`, checked once for logits of `vocab_size` columns on a device type.

    Raises ConfigError for options out of range, BackendError for a backend that is not here.
    """
    if vocab_size == 0:
        raise ConfigError("logits without columns: need a vocabulary of at least 1")
    check_filters(temperature, top_k, top_p, min_p)
    forbidden = tuple(sorted(set(never)))
    if forbidden and not 0 <= forbidden[0] <= forbidden[-1] < vocab_size:
        raise ConfigError(f"never={forbidden}: expected ids below {vocab_size}")
    if len(forbidden) == vocab_size:
        raise ConfigError("never: every id is forbidden")
    if measure not in ("model", "drawn"):
        raise ConfigError(f"measure={measure!r}: expected 'model' or 'drawn'")
    options = {
        "temperature": float(temperature), "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "forbidden": forbidden, "measure": measure,
    }  # fmt: skip
    return Drawing(_backend(backend_name(backend, device=device)), vocab_size, options)


def reveal(
    tokens: Tensor,
    asked: Tensor,
    drawn: Draw,
    score: Tensor,
    *,
    count: Tensor,
    threshold: float | None = None,
    backend: str | None = None,
) -> Revealed:
    """The canvas `tokens` (B, L) with the surest of the draws at `asked` (B, L) bool written.

    See `kernels.reveal_torch.reveal_torch`: `count` (B,) int64 places a sample, those of the
    highest `score` (N,), and all at or above `threshold`. Nothing waits for the device. The
    backends are torch and triton, which runs where it is the backend of the draw.
    """
    chosen = backend_name(backend, device=tokens.device.type)
    return REVEALS["triton" if chosen == "triton" else "torch"](
        tokens, asked, drawn, score, count_B=count, threshold=threshold
    )


def check_filters(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Raise ConfigError where a sampling option is out of its range."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature={temperature}: expected a finite number >= 0")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ConfigError(f"top_k={top_k}: expected a whole number of at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: expected more than 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ConfigError(f"min_p={min_p}: expected 0 to 1")


def _per_row(value: int | Tensor, rows: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        ready = value.shape == (rows,) and value.dtype == torch.int64 and value.device == device
        return value if ready else value.to(device=device, dtype=torch.int64).expand(rows)
    if type(value) is not int:
        raise ConfigError(f"{value!r} in a random stream: expected a whole number")
    signed = (value + 2**63) % 2**64 - 2**63
    return torch.full((rows,), signed, dtype=torch.int64, device=device)


def _span(
    span: tuple[int, int] | Tensor | None, rows: int, device: torch.device, columns: int
) -> Tensor | None:
    if span is None:
        return None
    if not isinstance(span, Tensor):
        first, stop = span
        if not 0 <= first < stop <= columns:
            raise ConfigError(f"span={span}: expected 0 <= first < stop <= {columns}")
    elif span.shape not in ((2,), (rows, 2)):
        raise ConfigError(f"span {tuple(span.shape)}: expected (2,) or ({rows}, 2)")
    return torch.as_tensor(span, dtype=torch.int64, device=device).expand(rows, 2)


def masked_cross_entropy(
    features: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    never: tuple[int, ...] = (),
    span: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk: int | None = None,
    backend: str | None = None,
) -> CrossEntropy:
    """The cross-entropy of head(features) at the chosen rows, without holding their logits.

    `value` is the sum of weight times smoothed -log p(target), `nll` (N,) nats without
    smoothing, weight or graph. `features` (B, L, D) or (N, D); `rows`, bool of their leading
    shape, are the rows that anything is computed for, None all of them. `targets` int64 and
    `weights` (None is 1) have the features' leading shape, or are (N,) already. `never` ids
    and ids outside of a row's `span` (N, 2) (first, stop) have probability 0; smoothing
    spreads over the others.

    The value is differentiable once in the features, the weights and the head's parameters;
    gradients are computed in the forward, `chunk` rows of logits at a time (None: at most 24
    MiB of them on a CPU, 60 MiB elsewhere). In float32, or float64 for float64 features; under
    autocast the logits are those that the head gives there. Where the `backend` of the draw is
    triton (see `backend_name`) a kernel of its own goes from logits to their gradient, else torch.

    Raises ConfigError for shapes, ids or options that do not fit, BackendError for a backend
    that is not here.

    >>> masked_cross_entropy(torch.zeros(2, 3), nn.Linear(3, 1), torch.tensor([0, 0])).nll.tolist()
    [0.0, 0.0]
    """
    if not isinstance(head, nn.Module):
        raise ConfigError(f"head is a {type(head).__name__}: expected a module, for its parameters")
    if features.dim() < 2 or not features.is_floating_point():
        raise ConfigError(f"features {tuple(features.shape)} {features.dtype}: expected (N, D)")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing}: expected 0 up to less than 1")
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise ConfigError(f"chunk={chunk!r}: expected a whole number of rows, at least 1")
    if targets.dtype != torch.int64:
        raise ConfigError(f"targets {targets.dtype}: expected int64")
    forbidden, leading = tuple(sorted(set(never))), features.shape[:-1]
    if forbidden and forbidden[0] < 0:
        raise ConfigError(f"never={forbidden}: expected ids from 0")
    if rows is not None and (rows.shape != leading or rows.dtype != torch.bool):
        raise ConfigError(f"rows {tuple(rows.shape)} {rows.dtype}: expected {tuple(leading)} bool")
    where = None if rows is None else rows.flatten().nonzero()[:, 0]
    features = features.flatten(0, -2)
    if where is not None:
        features = features.index_select(0, where)
    if weights is None:
        weights = features.new_ones(len(features))
    if span is not None and span.shape != (len(features), 2):
        raise ConfigError(f"span {tuple(span.shape)}: expected ({len(features)}, 2)")
    return chunked_cross_entropy(
        features,
        head,
        _chosen("targets", targets, leading, where),
        weight_N=_chosen("weights", weights, leading, where).to(wide_of(features.dtype)),
        forbidden=forbidden,
        span=span,
        smoothing=label_smoothing,
        chunk=chunk,
        by_triton=backend_name(backend, device=features.device.type) == "triton",
    )


def _chosen(name: str, tensor: Tensor, leading: torch.Size, where: Tensor | None) -> Tensor:
    """The rows `where` of a tensor of that shape; one that has only those stays as it is."""
    count = leading.numel() if where is None else len(where)
    if tensor.shape == leading:
        tensor = tensor.flatten()
        return tensor if where is None else tensor.index_select(0, where)
    if tensor.shape != (count,):
        raise ConfigError(f"{name} {tuple(tensor.shape)}: expected {tuple(leading)} or ({count},)")
    return tensor
