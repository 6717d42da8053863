"""The categorical draw: one function whichever backend runs it, and its form bound to options."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict, Unpack, cast

import torch
from torch import Tensor

from mdiff.errors import ConfigError
from mdiff.kernels.draw_triton import draw_triton
from mdiff.kernels.reference import Draw, guided_logits, kept_columns, permitted_columns
from mdiff.ops.backend import BACKENDS, backend_name

# Logits that exist at once in `of_features`: 16 MB of float32 on a CPU, 512 MB elsewhere.
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 27}
# Of the log-probabilities (n, V) of a part of a call's rows, one number a row (n,).
LawReader = Callable[[Tensor, slice], Tensor]


class Filters(TypedDict, total=False):
    """The temperature of a draw and its filters; by default 1 and none."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None


def draw(
    logits: Tensor,
    *,
    seed: int | Tensor,
    sample: int | Tensor | None = None,
    step: int | Tensor = 0,
    position: int | Tensor | None = None,
    never: tuple[int, ...] = (),
    span: tuple[int, int] | Tensor | None = None,
    measure: str = "model",
    unconditional: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    backend: str | None = None,
    **filters: Unpack[Filters],
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
    (rows, columns), device = logits.shape, logits.device
    bound = bind_draw(
        columns, device=device.type, never=never, measure=measure, backend=backend, **filters
    )
    if sample is None and position is None:
        position = torch.arange(rows, device=device)
    return bound(
        logits,
        scale=_guidance_scale(guidance_scale, logits, unconditional),
        seed=_per_row(seed, rows, device),
        sample=_per_row(0 if sample is None else sample, rows, device),
        step=_per_row(step, rows, device),
        position=_per_row(0 if position is None else position, rows, device),
        span=_span(span, rows, device, columns),
        unconditional=unconditional,
    )


@dataclass(frozen=True)
class BoundDraw:
    """A backend bound to the options of `draw`: what a sampler calls at every step."""

    run: Callable[..., Draw]
    vocab_size: int
    forbidden: tuple[int, ...]
    options: Mapping[str, object]

    @property
    def is_plain(self) -> bool:
        """Whether it draws from the model's own law: temperature 1 and no filter that cuts."""
        filters = [self.options[name] for name in ("top_k", "top_p", "min_p")]
        return self.options["temperature"] == 1 and filters in ([None] * 3, [None, 1, None])

    def __call__(self, logits: Tensor, **row: Tensor | None) -> Draw:
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
        self, features: Tensor, head: Callable[[Tensor], Tensor] | None, *,
        unconditional: Tensor | None = None, standing: Tensor | None = None,
        read: LawReader | None = None, **row: Tensor | None,
    ) -> tuple[Draw, Tensor]:  # fmt: skip
        """The same of the logits that `head` makes of `features` (N, D), not all at once.

        The head runs on as many rows at a time as have CHUNK[device] logits: on a CPU they are
        drawn from while they lie in its last cache. Without a head the features are the logits.
        `unconditional` (N, D) are the features of the other branch. The second result are the
        log-probabilities (N,) of the ids `standing` (N,) int64, by default those of the draws; or
        what `read` makes of the law of each part of the rows.
        """
        size = max(1, CHUNK.get(features.device.type, CHUNK["cuda"]) // self.vocab_size)
        size = len(features) if head is None else size
        drawn, scores = [], []
        for first in range(0, max(len(features), 1), max(size, 1)):
            part = slice(first, first + size)
            own = {name: None if each is None else each[part] for name, each in row.items()}
            logits = features[part] if head is None else head(features[part])
            other = None if unconditional is None else unconditional[part]
            other = other if head is None or other is None else head(other)
            drawn.append(self(logits, unconditional=other, **own))
            if read is not None:
                scores.append(read(self.law(logits, unconditional=other, **own), part))
            elif standing is not None:
                scores.append(
                    self.log_prob(logits, standing[part], drawn[-1], unconditional=other, **own)
                )
        whole = drawn[0] if len(drawn) == 1 else Draw(*map(torch.cat, zip(*drawn)))
        return whole, torch.cat(scores) if scores else whole.log_prob

    def law(
        self, logits: Tensor, *, unconditional: Tensor | None = None,
        scale: Tensor | None = None, span: Tensor | None = None, **_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The log-probabilities (N, V) of logits at temperature 1 without filters.

        In float32, or float64 for logits of that type; -inf for a forbidden id.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if unconditional is not None and scale is not None:
            logits = guided_logits(logits, unconditional.to(logits.dtype), scale)
        allowed = permitted_columns(logits, self.forbidden, span)
        return logits.masked_fill(~allowed, -torch.inf).log_softmax(1)

    def log_prob(
        self, logits: Tensor, tokens: Tensor, drawn: Draw, *, unconditional: Tensor | None = None,
        scale: Tensor | None = None, span: Tensor | None = None, **_: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The log-probability (N,) of ids (N,), from that of the ids `drawn` of the same logits.

        log p(a) = log p(b) + (logit a - logit b), so that no row is read again: of measure="model",
        -inf for a forbidden id, and without a meaning for one that has no column.
        """
        column = tokens.clamp(max=self.vocab_size - 1)
        pair = torch.stack([column, drawn.tokens], 1)
        both = logits.gather(1, pair).to(drawn.log_prob.dtype)
        if unconditional is not None and scale is not None:
            both = guided_logits(both, unconditional.gather(1, pair).to(both.dtype), scale)
        log_prob = drawn.log_prob + (both[:, 0] - both[:, 1])
        if self.forbidden:
            banned = torch.isin(column, _ids(self.forbidden, column.device))
            log_prob = log_prob.masked_fill(banned, -torch.inf)
        if span is not None:
            outside = (column < span[:, 0]) | (column >= span[:, 1])
            log_prob = log_prob.masked_fill(outside, -torch.inf)
        return log_prob

    def drawn_law(self, logits: Tensor, **row: Tensor | None) -> Tensor:
        """The probabilities (N, V) float64 that ids are drawn with, at a temperature above 0.

        `row` as for `law`.
        """
        log_p = self.law(logits, **row).double()
        own = cast(Filters, self.options)
        scaled = (log_p - log_p.amax(1, keepdim=True)) / own["temperature"]
        kept = kept_columns(scaled, own["top_k"], own["top_p"], own["min_p"])
        return scaled.masked_fill(~kept, -torch.inf).softmax(1)


@lru_cache(maxsize=16)
def _ids(forbidden: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(forbidden, dtype=torch.int64, device=device)


def bind_draw(
    vocab_size: int,
    *,
    device: str = "cpu",
    never: tuple[int, ...] = (),
    measure: str = "model",
    backend: str | None = None,
    **filters: Unpack[Filters],
) -> BoundDraw:
    """The options of `draw`, checked once for logits of `vocab_size` columns on a device type.

    Raises ConfigError for options out of range, BackendError for a backend that is not here.
    """
    if vocab_size == 0:
        raise ConfigError("logits without columns: need a vocabulary of at least 1")
    checked = checked_filters(**filters)
    forbidden = tuple(sorted(set(never)))
    if forbidden and not 0 <= forbidden[0] <= forbidden[-1] < vocab_size:
        raise ConfigError(f"never={forbidden}: expected ids below {vocab_size}")
    if len(forbidden) == vocab_size:
        raise ConfigError("never: every id is forbidden")
    if measure not in ("model", "drawn"):
        raise ConfigError(f"measure={measure!r}: expected 'model' or 'drawn'")
    chosen = backend_name(backend, device=device)
    run = draw_triton if chosen == "triton" else BACKENDS[chosen]
    options = {**checked, "forbidden": forbidden, "measure": measure}
    return BoundDraw(run, vocab_size, forbidden, options)


def checked_filters(
    *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    min_p: float | None = None,
) -> Filters:  # fmt: skip
    """All four filters with their defaults; ConfigError where one is out of its range."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature={temperature}: expected a finite number >= 0")
    if top_k is not None and (type(top_k) is not int or top_k < 1):
        raise ConfigError(f"top_k={top_k}: expected a whole number of at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: expected more than 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ConfigError(f"min_p={min_p}: expected 0 to 1")
    return {"temperature": float(temperature), "top_k": top_k, "top_p": top_p, "min_p": min_p}


def _guidance_scale(
    scale: float | Tensor, logits: Tensor, unconditional: Tensor | None
) -> Tensor | None:
    """The scale of each row (N,) float64, None without a second branch."""
    if unconditional is None:
        if isinstance(scale, Tensor) or scale != 1:
            raise ConfigError("guidance_scale without unconditional logits has no effect")
        return None
    if not isinstance(scale, Tensor) and not math.isfinite(scale):
        raise ConfigError(f"guidance_scale={scale}: expected a finite number")
    if unconditional.shape != logits.shape or unconditional.dtype != logits.dtype:
        raise ConfigError(
            f"unconditional {tuple(unconditional.shape)} {unconditional.dtype}: expected "
            f"{tuple(logits.shape)} {logits.dtype}, as the logits"
        )
    return torch.as_tensor(scale, dtype=torch.float64, device=logits.device).expand(len(logits))


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
