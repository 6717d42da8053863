"""The reverse process of noise that also writes random tokens, on a grid."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mdiff.denoiser import prediction_of
from mdiff.kernels import philox
from mdiff.ops import Draw
from mdiff.process import Ids, Noise, Process
from mdiff.sampling.state import State
from mdiff.sampling.unmasking import Unmasking
from mdiff.tokens import TokenSpace


def denoise(
    fill: Unmasking, process: Process, m: Tensor, space: TokenSpace, *, kappa: float = 1.0,
    start: float | None = None,
) -> Iterator[State]:  # fmt: skip
    """States of the process on the levels m (steps + 1,) of noise, the last of them 0.

    A step from m_t to m_s asks the denoiser at every position that is not given. With the
    prediction p, a state z stays with (a_t / a_s) q_s(z | p) / q_t(z | p), and is otherwise drawn
    again from q_s(. | p): the transition of `mdiff.process`. Of a model that predicts the posterior
    p is the drawn token, of one that predicts without the state its own law. With 1 - `kappa` the
    step goes to m = 0 and on to m_s by fresh noise (Duo, chapter 2). Masks begin as the process
    does at m[0], and with a `start` the other tokens that are not given take that noise.

    Raises ConfigError where the denoiser does not say what it predicts.
    """
    predicts = prediction_of(fill.denoiser)
    ids = Ids.of(space, fill.tokens.shape[1], fill.tokens.device)
    # Scalars on the CPU go with tensors of any device.
    shares = [process.noise(level) for level in m.cpu()]
    yield from _begin(fill, m[0], shares[0], ids, process, start)
    number = fill.free.sum(1).tolist()
    for step in range(1, len(shares) if any(number) else 0):
        t = process.schedule.time_at(m[step - 1]).expand(len(number))
        drawn, standing = fill.ask_beside(fill.free, step, t, number=number)
        token = fill.tokens[fill.free]
        p = (drawn.tokens == token).double() if predicts == "posterior" else standing.double().exp()
        p = torch.where(token == fill.mask_id, 0.0, p)
        p = torch.zeros(fill.tokens.shape, dtype=p.dtype, device=p.device).masked_scatter(
            fill.free, p
        )
        write, hide, over = _events(fill, p, shares[step - 1], shares[step], ids, step, kappa)
        t = process.schedule.time_at(m[step]).expand(len(number))
        other = ids.chosen(fill.uniform(philox.NOISE, step))
        yield _moved(fill, drawn, t, write=write, hide=hide, over=over, other=other)


def _begin(
    fill: Unmasking, m: Tensor, noise: Noise, ids: Ids, process: Process, start: float | None
) -> Iterator[State]:
    """The state that the process has at its first level of noise, where it is another one."""
    u = fill.uniform(philox.CORRUPT)
    hidden = fill.hidden
    lost = hidden if start is None else fill.free
    # A mask has no clean token to keep: it is noise already.
    keep = torch.where(hidden, 0.0, float(noise.keep))
    rest = torch.where(hidden, float(noise.mask + noise.other), 1.0)
    hide = lost & (u * rest >= keep) & (u * rest < keep + noise.mask)
    over = lost & ~hide & (u * rest >= keep)
    if bool((over | (hide & ~hidden)).any()):
        t = process.schedule.time_at(m).expand(len(fill.tokens))
        other = ids.chosen(fill.uniform(philox.NOISE))
        yield _moved(fill, None, t, write=fill.nothing, hide=hide, over=over, other=other)


def _moved(
    fill: Unmasking, drawn: Draw | None, t: Tensor, *, write: Tensor, hide: Tensor, over: Tensor,
    other: Tensor,
) -> State:  # fmt: skip
    """Write the draws at `write`, hide the tokens at `hide`, and put `other` at `over`."""
    before, shown = fill.tokens, fill.tokens != fill.mask_id
    fill.tokens, fill.hidden = torch.where(over, other, before), fill.hidden & ~over
    asked = fill.nothing if drawn is None else fill.free
    state = fill.revise(asked, drawn, t, write=write, hide=hide & shown)
    return replace(state, rewritten=state.rewritten | (over & shown & (other != before)))


def _events(
    fill: Unmasking, p: Tensor, at_t: Noise, at_s: Noise, ids: Ids, step: int, kappa: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions take the draw, the mask and a random id in this step, each (B, L) bool.

    `p` (B, L) float64 is the probability of the standing token, 0 at masks.
    """
    hidden = fill.tokens == fill.mask_id
    b_t = torch.where(hidden, at_t.mask, at_t.other / ids.number)
    total = at_t.keep * p + b_t
    u = fill.uniform(philox.REVEAL, step) * total

    def moved(at: Noise) -> tuple[Tensor, Tensor, Tensor]:
        ratio = at_t.keep / at.keep
        b = torch.where(hidden, at.mask, at.other / ids.number)
        stay = ratio * (at.keep * p + b)
        return u > stay, (u - stay) / (b_t - ratio * b), at.keep

    leaves, inside, keep = moved(at_s)
    if kappa < 1:
        clean, _, _ = moved(Noise(torch.ones_like(at_s.keep), *[torch.zeros_like(at_s.keep)] * 2))
        by_noise = fill.uniform(philox.ORDER, step) >= kappa
        again = fill.uniform(philox.CORRUPT, step)
        leaves = torch.where(by_noise, clean | (again >= keep), leaves)
        inside = torch.where(by_noise, again, inside)
    leaves = leaves & fill.free
    last = bool(at_s.keep == 1)
    write = leaves & ((inside < keep) | last)
    hide = leaves & ~write & (inside < keep + at_s.mask)
    return write, hide, leaves & ~write & ~hide
