"""Baselines: the operations of other projects between the logits and the tokens.

Re-created from descriptions for `mdiff bench`, which times them and checks their law; mdiff
samples with none of them. Each takes `logits_NV` (N, V) of all positions and `tokens_N` (N,)
int64, `mask_id` where hidden, and returns all positions. Bytes per logit are counted from the
operations, each array read or written once an operation. Random numbers are torch's global ones.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from mdiff.denoiser import Denoiser
from mdiff.errors import BackendError

# What MDLM adds to a logit to forbid it, and the floor of its noise under a logarithm.
FORBIDS = -1e6
NOISE_FLOOR = 1e-10
# The floor of aMUSEd's numbers under a logarithm.
AMUSED_FLOOR = 1e-20
# aMUSEd's own number of steps; the step in the middle is timed.
AMUSED_STEPS = 12


def mdlm_probabilities(
    logits_NV: Tensor, tokens_N: Tensor, *, mask_id: int, dtype: torch.dtype
) -> Tensor:
    """p(clean token), (N, V), a given token with certainty: MDLM's SUBS parametrisation.

    Project kuleshov-group/mdlm, `Diffusion._subs_parameterization` and the exp of its caller,
    as of September 2025. Logits of type `dtype` are overwritten, as there.
    """
    log_p = logits_NV.to(dtype)
    log_p[:, mask_id] += FORBIDS
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    given = tokens_N != mask_id
    log_p[given] = FORBIDS
    log_p[given, tokens_N[given]] = 0
    return log_p.exp()


def mdlm_draw(p_NV: Tensor, tokens_N: Tensor, *, mask_id: int, t: float, s: float) -> Tensor:
    """The tokens (N,) at time s < t, m(t) = t: whether and what in one categorical over V.

    Project kuleshov-group/mdlm, `_ddpm_update` and `_sample_categorical`, as of September
    2025: a race of noise over every element, the mask among the classes with weight s.
    """
    q_NV = p_NV * (t - s)
    q_NV[:, mask_id] = s
    race_NV = NOISE_FLOOR - (torch.rand_like(q_NV) + NOISE_FLOOR).log()
    drawn_N = (q_NV / race_NV).argmax(-1)
    return torch.where(tokens_N != mask_id, tokens_N, drawn_N)


def mdlm_step(
    logits_NV: Tensor, tokens_N: Tensor, *, mask_id: int, t: float, s: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """The tokens (N,) at time s: `mdlm_probabilities`, then `mdlm_draw`, over all positions.

    About 184 bytes a logit in float64 (Zheng et al. 2024 show why it must be), 92 in float32.
    """
    p_NV = mdlm_probabilities(logits_NV, tokens_N, mask_id=mask_id, dtype=dtype)
    return mdlm_draw(p_NV, tokens_N, mask_id=mask_id, t=t, s=s)


def mdlm_sampler(
    denoiser: Denoiser, canvas: Tensor, *, mask_id: int, times: Sequence[float],
    dtype: torch.dtype, cached: bool,
) -> Iterator[tuple[Tensor, bool]]:  # fmt: skip
    """The canvas (1, L) after each step from a time to the next, and whether it cost a call.

    Project kuleshov-group/mdlm, `_ddpm_update`, and with `cached` `_ddpm_caching_update`, as of
    September 2025: there the model is called again only after a step that changed something,
    but the categorical over all positions is drawn at every step.
    """
    tokens, p_NV = canvas, None
    for t, s in pairwise(times):
        called = p_NV is None
        if p_NV is None:
            p_NV = mdlm_probabilities(denoiser(tokens)[0], tokens[0], mask_id=mask_id, dtype=dtype)
        after = mdlm_draw(p_NV, tokens[0], mask_id=mask_id, t=t, s=s)[None]
        if not cached or not torch.equal(after, tokens):
            p_NV = None
        tokens = after
        yield tokens, called


def llada_step(
    logits_NV: Tensor, tokens_N: Tensor, *, mask_id: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The tokens (N,) and the probability of each, -inf where given: LLaDA's Gumbel maximum.

    Project ML-GSAI/LLaDA, `generate.py` (`add_gumbel_noise`, low-confidence remasking), as of
    June 2026: noise in float64 over every element, then a softmax of all positions of which one
    column is gathered. The choice of the tokens to keep, of N numbers, is left out. About 120
    bytes a logit.
    """
    wide_NV = logits_NV.to(torch.float64)
    noise_NV = torch.rand_like(wide_NV)
    gumbel_NV = (-noise_NV.log()) ** temperature
    drawn_N = (wide_NV.exp() / gumbel_NV).argmax(-1)
    p_NV = logits_NV.softmax(-1)
    p_N = p_NV.gather(-1, drawn_N[:, None])[:, 0]
    hidden = tokens_N == mask_id
    return torch.where(hidden, drawn_N, tokens_N), torch.where(hidden, p_N, -torch.inf)


def amused_step(
    logits_NV: Tensor, tokens_N: Tensor, *, mask_id: int, ratio: float = 0.5,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tokens (N,) after the least confident were masked again, and before.

    Project huggingface/diffusers, `AmusedScheduler.step`, 0.42 (2026): softmax of all positions,
    `multinomial`, gather, and the positions whose log-probability plus Gumbel noise is among the
    n cos(pi ratio / 2) lowest are hidden again. About 40 bytes a logit, including those that
    `multinomial` reads to check its input.
    """
    hidden = tokens_N == mask_id
    p_NV = logits_NV.softmax(-1)
    drawn_N = torch.where(hidden, torch.multinomial(p_NV, 1)[:, 0], tokens_N)
    wanted = torch.tensor(math.floor(len(tokens_N) * math.cos(ratio * math.pi / 2)))
    count = torch.minimum(hidden.sum().cpu() - 1, wanted).clamp(min=1).to(tokens_N.device)
    p_N = p_NV.gather(-1, drawn_N[:, None])[:, 0]
    p_N = torch.where(hidden, p_N, torch.finfo(p_N.dtype).max)
    race_N = -torch.rand_like(p_N).clamp(AMUSED_FLOOR).log()
    sure_N = p_N.clamp(AMUSED_FLOOR).log() - temperature * race_N.clamp(AMUSED_FLOOR).log()
    cut = sure_N.sort().values[count]
    return torch.where(sure_N < cut, mask_id, drawn_N), drawn_N


@lru_cache(maxsize=4)
def diffusers_amused_step(mask_id: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`amused_step` by the installed diffusers: logits (N, V), tokens (N,) -> both tokens (N,).

    Raises BackendError where diffusers is not installed or cannot be imported.
    """
    if find_spec("diffusers") is None:
        raise BackendError("diffusers is not installed; pip install 'mdiff-toolkit[peers]'")
    try:
        from diffusers.schedulers.scheduling_amused import AmusedScheduler
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"diffusers cannot be imported: {error}") from error
    scheduler = AmusedScheduler(mask_token_id=mask_id)
    scheduler.set_timesteps(AMUSED_STEPS)

    def step(logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        after, drawn = scheduler.step(
            logits_NV[None], AMUSED_STEPS // 2, tokens_N[None], return_dict=False
        )
        return after[0], drawn[0]

    return step
