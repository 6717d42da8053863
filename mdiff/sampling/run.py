"""Run a sampler to its end, and add up the figures of each sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.denoiser import Condition, Denoiser
from mdiff.errors import CheckpointError
from mdiff.sampling.binding import Sampler, bind
from mdiff.sampling.seeds import Seed, plain_seed
from mdiff.sampling.state import LastWriting, State
from mdiff.tokens import TokenSpace


@dataclass(frozen=True)
class Sample:
    """Finished canvases.

    `tokens` (B, L) int64; `calls` (B,) int64, the evaluations that each sample needed, and
    `rounds` (B,) int64 the calls one after another; `log_prob` (B,) nats, summed over the drawn
    tokens, and `log_prob_is_exact`, whether that is the log-likelihood of the tokens given the
    order in which they were drawn; `entropy` (B,), the mean nats of the draws, 0 where nothing
    was drawn; `nats_spent` (B,), the sum over steps of the entropies of its draws but the largest:
    with the conditionals of one joint, and positions that do not depend on what is drawn, no
    less in the mean than the divergence of the joint from this law. `writing` is what is
    known of each position's last writing, the number of times included.
    """

    tokens: Tensor
    calls: Tensor
    log_prob: Tensor
    entropy: Tensor
    rounds: Tensor
    log_prob_is_exact: bool
    nats_spent: Tensor
    writing: LastWriting


class Tally:
    """Adds up the states of a run; `sample()` is the result so far."""

    def __init__(self, canvas: Tensor) -> None:
        zeros = torch.zeros(canvas.shape[0], dtype=torch.float64, device=canvas.device)
        self.tokens, self.calls = canvas, zeros.long()
        self.rounds, self.exact = self.calls, True
        self.log_prob, self.entropy, self.drawn = zeros, zeros, zeros.long()
        self.spent = zeros
        self.writing = LastWriting(canvas)

    def add(self, state: State) -> None:
        """One more state."""
        self.tokens, self.calls, self.rounds = state.tokens, state.calls, state.rounds
        self.exact = state.log_prob_is_exact
        self.drawn = self.drawn + state.revealed.sum(1)
        self.log_prob = self.log_prob + state.log_prob.double().sum(1)
        entropy = state.entropy.double()
        self.entropy = self.entropy + entropy.sum(1)
        if not state.in_turn:
            self.spent = self.spent + entropy.sum(1) - entropy.amax(1)
        self.writing.add(state)

    def sample(self) -> Sample:
        """The tokens and figures; CheckpointError where a draw had no law to draw from."""
        bad = (~(self.log_prob + self.entropy).isfinite()).nonzero()[:, 0].tolist()
        if bad:
            raise CheckpointError(
                f"the denoiser gave NaN or infinite logits for samples {bad}: the weights are "
                "damaged, or their type overflows (try dtype='float32')"
            )
        return Sample(
            self.tokens, self.calls, self.log_prob, self.entropy / self.drawn.clamp(min=1),
            self.rounds, self.exact, self.spent, self.writing,
        )  # fmt: skip


def sample(
    denoiser: Denoiser,
    canvas: Tensor,
    *,
    space: TokenSpace,
    sampler: str | Sampler = "first_hitting",
    seed: Seed = 0,
    valid: Tensor | None = None,
    cond: Condition | None = None,
    given: Tensor | None = None,
    **options: object,
) -> Sample:
    """The canvas (B, L) int64 filled in by a sampler, with its figures.

    The positions `given` (B, L) bool are never changed, by default all that do not hold the mask
    id: with `given`, samplers that take tokens back revise the others. `valid` (B, L) bool is
    False at padding. `sampler` is a name from samplers/ or a function of their shape; `options`
    are that sampler's own, where a schedule or an inner sampler may be a name too; a
    `block_length` runs any sampler block by block, by `blocks`, as a block model's own does
    unasked. An int `seed` makes row b sample b of it, seeds (B,) int64 make each row sample 0
    of its own; a torch.Generator, or one a row, only yields seeds. Where nothing is hidden the
    row comes back unchanged with all figures 0.

    Raises ConfigError for an unknown sampler or option, DataError for a canvas that does not
    fit the space, CheckpointError where the denoiser gives NaN or infinite logits.

    >>> from mdiff import from_logits, TokenSpace, sample
    >>> model = from_logits(lambda tokens: torch.zeros(*tokens.shape, 3))
    >>> sample(model, torch.full((1, 4), 3), space=TokenSpace(3, mask_id=3)).calls.tolist()
    [4]
    """
    bound = bind(sampler, options, denoiser)
    space.check(canvas, valid)
    tally = Tally(canvas)
    states = bound(
        denoiser, canvas, space=space.checked(), seed=plain_seed(seed, len(canvas)), valid=valid,
        cond=cond, given=given,
    )  # fmt: skip
    with torch.no_grad():
        for state in states:
            tally.add(state)
    return tally.sample()
