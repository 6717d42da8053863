"""Mixtures of experts of published models: what their configs may say, and routing by token."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdiff.backbones.layers.decoder import LayerDecoder, Rotary, Shape
from mdiff.backbones.layers.modules import GatedMLP, Matrix, drawn
from mdiff.errors import CheckpointError
from mdiff.files import MOST_EXPERTS, Fields

# Twice what the largest published mixtures have, all layers together.
MOST_EXPERTS_IN_ALL = 1 << 16


def only(fields: Fields, name: str, *known: object) -> None:
    """Refuse an entry that is there and neither null nor one of `known`; CheckpointError."""
    value = fields.described.get(name)
    # 0 and false compare equal: the type is part of what an entry says.
    if value is not None and not any(value == one and type(value) is type(one) for one in known):
        raise CheckpointError(
            f"{fields.origin}: {name}={value!r} is not supported; known: "
            f"{', '.join(map(repr, [*known, None]))}"
        )


def expert_counts(fields: Fields, layers: int) -> tuple[int, int]:
    """The experts of a layer and how many of them a token uses; CheckpointError if absurd."""
    experts = fields.whole("num_experts", most=MOST_EXPERTS)
    if experts * layers > MOST_EXPERTS_IN_ALL:
        raise CheckpointError(
            f"{fields.origin}: num_experts={experts} in each of {layers} layers: expected at most "
            f"{MOST_EXPERTS_IN_ALL} in all"
        )
    return experts, fields.whole("num_experts_per_tok", most=experts)


class PowerRotary(Rotary):
    """`Rotary` whose frequencies are base^-p, not 1 / base^p: they differ in the last bit."""

    def frequencies(self, size: int, device: torch.device) -> Tensor:
        """See `Rotary`."""
        count = size // 2
        powers = torch.arange(count, dtype=torch.float32, device=device) / count
        result: Tensor = self.base**-powers
        return result


class SoftmaxRouter(nn.Module):
    """The experts of the largest shares of the softmax over all of them, weighted by the shares.

    `normed` shares of a token's experts sum to 1.
    """

    def __init__(self, width: int, count: int, used: int, *, normed: bool = False) -> None:
        super().__init__()
        self.used, self.normed, self.of_any_type = used, normed, True
        self.weight = drawn(count, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of tokens `x` (N, D), (N, K) int64, and their weights (N, K)."""
        weights, chosen = router_logits(x, self.weight).softmax(-1).topk(self.used, -1)
        return chosen, weights / weights.sum(-1, keepdim=True) if self.normed else weights


class MixtureDecoder(LayerDecoder):
    """A decoder of inclusionAI's layout; the config may name the mask either way, or not."""

    def __init__(
        self, fields: Fields, shape: Shape, layers: Iterable[nn.Module], *, rotated: int
    ) -> None:
        super().__init__(
            fields, shape, layers, rotary=PowerRotary.of(fields),
            rotated=rotated, mask_id=fields.optional_id("mask_token_id", "mask_id"), head=Matrix,
        )  # fmt: skip


class Mixture(nn.Module):
    """Each token's few experts of a `gate`, and a layer that all tokens share, where `shared` > 0.

    The gate gives tokens (N, D) their experts (N, K) int64 and the weights of these (N, K).
    """

    def __init__(
        self, gate: nn.Module, count: int, *, width: int, inner: int, shared: int = 0
    ) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(GatedMLP(width, inner) for _ in range(count))
        self.shared_experts = GatedMLP(width, shared) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, of the shape of `x` (B, L, D)."""
        flat = x.flatten(0, 1)
        chosen, weights = self.gate(flat)
        mixed = of_experts(flat, self.experts, chosen, weights).view_as(x)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Each token's logit of each expert (N, E), in float32 at least; `weight` (E, D)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.linear(wide, weight.to(wide.dtype))


def of_experts(
    x: Tensor, experts: Sequence[nn.Module] | nn.ModuleList, chosen: Tensor, weights: Tensor
) -> Tensor:
    """sum_k weights[n, k] experts[chosen[n, k]](x[n]) of tokens `x` (N, D).

    `chosen` (N, K) int64, `weights` (N, K). Tokens are sorted by expert, and each expert runs
    once, on its own. The sum is taken in the type of the weights.
    """
    order = chosen.flatten().argsort(stable=True)
    sizes = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    parts = torch.split(x[order // chosen.shape[1]], sizes)
    made = torch.cat([expert(part) for expert, part in zip(experts, parts) if len(part)])
    spread = torch.empty_like(made).index_copy(0, order, made).view(*chosen.shape, -1)
    return (spread * weights[..., None]).sum(1).to(x.dtype)
