"""Psi: a mixture of the ancestral step and of noise on the prediction (Duo, chapter 2)."""

from collections.abc import Iterator

from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import ConfigError
from mdiff.process import Process, noise_in_force
from mdiff.sampling import State, Unmasking, denoise, grid_of_shares, remask
from mdiff.schedule import Linear, Schedule
from mdiff.tokens import TokenSpace


def psi(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    schedule: Schedule = Linear(),  # noqa: B008
    seed: int | Tensor = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    given: Tensor | None = None,
    steps: int = 128,
    kappa: float = 0.98,
    start: float | None = None,
    process: Process | None = None,
) -> Iterator[State]:
    """States of at most `steps` calls on `canvas` (B, L), in which written tokens are hidden again.

    A step from m_t to m_s is with `kappa` the ancestral one, otherwise all tokens are predicted
    and then hidden with m_s. For masks that is `remdm` with sigma = (1 - kappa) m_s, as which it
    runs; kappa=1 is `ancestral` draw for draw, and kappa=0 predicts and hides at every step. A
    finished canvas is revised from `start` on, as in `remdm`. A `process` whose noise also writes
    random tokens has its own schedule: the new noise is then its own (`sampling.denoise`).

    Raises ConfigError for kappa outside [0, 1], and steps or a start out of range.
    """
    if not 0 <= kappa <= 1:
        raise ConfigError(f"kappa={kappa}: expected 0 to 1")
    fill = Unmasking(
        denoiser, canvas, space=space, seed=seed, valid=valid, cond=cond, given=given,
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
    )  # fmt: skip
    schedule, process = noise_in_force(schedule, process)
    m = grid_of_shares(schedule, steps, start, canvas.device)
    if process is not None:
        yield from denoise(fill, process, m, space, kappa=kappa, start=start)
        return
    yield from remask(fill, m, schedule, lambda m_t, m_s: (1 - kappa) * m_s, start=start)
