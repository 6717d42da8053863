"""Toys of noise that writes random tokens: the ideal denoiser at each level, and its laws."""

from __future__ import annotations

import itertools

import torch
from toys import make_toy

from mdiff.process import Logistic, Masking, Mixed, Process, Uniform, transition
from mdiff.schedule import Cosine

TOY = make_toy(3, 3, seed=5)
MASK, LENGTH, VOCAB = TOY.vocab, TOY.length, TOY.vocab
SPREAD = torch.tensor([1 / VOCAB] * VOCAB + [0.0], dtype=torch.float64)
STATES = torch.tensor(list(itertools.product(range(VOCAB + 1), repeat=LENGTH)))
CLEAN = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
P_CLEAN = TOY.joint.flatten()
PROCESSES: dict[str, Process] = {
    "masking": Masking(), "uniform": Uniform(Cosine()), "gidd": Mixed(p_uniform=0.2),
    "gidd, gamma 2": Mixed(p_uniform=0.4, gamma=2.0), "logistic": Logistic(shift=0.5),
    "fixed share": Logistic(shift=0.3, scale=0.0),
}  # fmt: skip


def likelihoods(process: Process, m: torch.Tensor) -> torch.Tensor:
    """q(state | clean token) at levels m (...), (..., VOCAB, VOCAB + 1)."""
    keep, mask, other = process.noise(m[..., None, None])
    hidden = torch.arange(VOCAB + 1) == MASK
    return keep * torch.eye(VOCAB, VOCAB + 1, dtype=torch.float64) + other * SPREAD + mask * hidden


def prediction(process: Process, m: torch.Tensor, states: torch.Tensor, *, without: bool):
    """The ideal prediction of states (B, LENGTH) at levels m (B,), (B, LENGTH, VOCAB).

    `without` the state at the position itself.
    """
    q = likelihoods(process, m)
    rows = torch.arange(len(states))[:, None]
    each = [q[rows, CLEAN[:, i], states[:, i, None]] for i in range(LENGTH)]
    found = []
    for i in range(LENGTH):
        weight = P_CLEAN.expand(len(states), -1)
        for j in range(LENGTH):
            weight = weight if without and j == i else weight * each[j]
        found.append(weight @ torch.eye(VOCAB, dtype=torch.float64)[CLEAN[:, i]])
    law = torch.stack(found, 1)
    return law / law.sum(-1, keepdim=True).clamp(min=1e-300)


def posterior_of(process: Process, m: torch.Tensor, *, without: bool) -> torch.Tensor:
    """The ideal prediction of every state at one level, (STATES, LENGTH, VOCAB)."""
    return prediction(process, m.expand(len(STATES)), STATES, without=without)


class IdealDenoiser:
    """A Denoiser that is ideal at each row's time for the toy under a process.

    `says` is what it says that it predicts, by default the truth.
    """

    uses_time = True

    def __init__(self, process: Process, predicts: str, says: str = "") -> None:
        self.process, self.without = process, predicts == "leave_one_out"
        self.predicts = says or predicts

    def __call__(
        self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None, cache=None
    ):
        m = self.process.schedule.mask_prob(t.double())
        if bool((m == m[0]).all()):
            # The few states there are, once.
            law = posterior_of(self.process, m[0], without=self.without)[TOY.number(tokens)]
        else:
            law = prediction(self.process, m, tokens, without=self.without)
        logits = law.log()
        return logits if at is None else logits[at]


def start_of(process: Process) -> torch.Tensor:
    """The law (STATES,) at m = 1."""
    noise = process.noise(torch.ones((), dtype=torch.float64))
    one = noise.other * SPREAD
    one[MASK] += noise.mask
    return torch.stack([one[STATES[:, i]] for i in range(LENGTH)]).prod(0)


def step_matrix(process: Process, m_t: torch.Tensor, m_s: torch.Tensor, kappa: float = 1.0):
    """The chain's transition (STATES, STATES) from one level to another, with ideal predictions."""
    ideal = posterior_of(process, m_t, without=True)
    ideal = torch.cat([ideal, torch.zeros_like(ideal[..., :1])], -1)
    at_t, at_s = process.noise(m_t), process.noise(m_s)
    spread = SPREAD.expand(*STATES.shape, -1)
    law = transition(at_t, at_s, STATES, ideal, spread, mask_id=MASK)
    if kappa < 1:
        clean = process.noise(torch.zeros_like(m_t))
        to_clean = transition(at_t, clean, STATES, ideal, spread, mask_id=MASK)
        noised = to_clean[..., :VOCAB] @ likelihoods(process, m_s)
        law = kappa * law + (1 - kappa) * noised
    # States that the process never has are left out.
    law = law.nan_to_num(0.0)
    return torch.stack([law[:, i][:, STATES[:, i]] for i in range(LENGTH)]).prod(0)


def chain_law(process: Process, levels: torch.Tensor, kappa: float = 1.0) -> torch.Tensor:
    """The law (CLEAN,) at the end of the chain over the levels."""
    law = start_of(process)
    for m_t, m_s in itertools.pairwise(levels):
        law = law @ step_matrix(process, m_t, m_s, kappa)
    return law[TOY.number(CLEAN)]
