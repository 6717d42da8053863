"""The draw in vectorised torch: all tile sums, the cumulative mass and the winner at once."""

import torch
from torch import Tensor

from mdiff.kernels import philox
from mdiff.kernels.reference import TILE, Draw, guided_logits, kept_columns

# Rows are worked on in chunks of about this many logits, so that a chunk stays in cache.
CHUNK = 1 << 20
# exp(-800) is 0 in float64 too; the clamp keeps 0 * -inf out of the entropy.
LOWEST = -800.0
# A temperature outside is taken as this: the draw is the same, and float32 holds T and 1 / T.
COLDEST, HOTTEST = 1e-37, 1e37


def draw_torch(
    logits_NV: Tensor,
    *,
    seed: Tensor,
    sample: Tensor,
    step: Tensor,
    position: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    forbidden: tuple[int, ...] = (),
    span: Tensor | None = None,
    measure: str = "model",
    unconditional: Tensor | None = None,
    scale: Tensor | None = None,
    tile: int = TILE,
) -> Draw:
    """One id a row and its figures; arguments and law as `reference.draw_reference`.

    float32 inside for float32, bfloat16 and float16 logits, float64 for float64.
    """
    # The memory of a chunk is written over, which a graph would not survive.
    logits_NV = logits_NV.detach()
    unconditional = None if unconditional is None else unconditional.detach()
    rows, vocab = logits_NV.shape
    tile = min(tile, vocab)
    chunk = max(1, CHUNK // max(vocab, 1))
    wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    # The same memory for every chunk: new pages would cost as much as the arithmetic.
    shape = (2, min(chunk, rows), -(-vocab // tile) * tile)
    memory = torch.empty(shape, dtype=wide, device=logits_NV.device)
    parts = [
        _draw_chunk(
            logits_NV[i : i + chunk],
            counter=(seed[i : i + chunk], position[i : i + chunk], sample[i : i + chunk],
                     step[i : i + chunk]),
            temperature=temperature,
            filters=(top_k, top_p, min_p),
            forbidden=forbidden,
            span=None if span is None else span[i : i + chunk],
            measure=measure,
            guide=None if unconditional is None or scale is None
            else (unconditional[i : i + chunk], scale[i : i + chunk]),
            tile=tile,
            memory=memory,
        )
        for i in range(0, max(rows, 1), chunk)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else Draw(*(torch.cat(field) for field in zip(*parts)))


def _draw_chunk(
    logits_NV: Tensor,
    *,
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    temperature: float,
    filters: tuple[int | None, float | None, float | None],
    forbidden: tuple[int, ...],
    span: Tensor | None,
    measure: str,
    guide: tuple[Tensor, Tensor] | None,
    tile: int,
    memory: Tensor,
) -> Draw:
    vocab = logits_NV.shape[1]
    model_NV, weight_NV = memory[:, : len(logits_NV)]
    padded = model_NV.shape[1]
    if guide is not None:
        wide = model_NV.dtype
        logits_NV = guided_logits(logits_NV.to(wide), guide[0].to(wide), guide[1])
    model_NV[:, :vocab] = logits_NV
    model_NV[:, vocab:] = -torch.inf
    for column in forbidden:
        model_NV[:, column] = -torch.inf
    if span is not None:
        columns = torch.arange(padded, device=logits_NV.device)
        model_NV.masked_fill_((columns < span[:, :1]) | (columns >= span[:, 1:]), -torch.inf)

    peak_N = model_NV.amax(1)
    sound_N = torch.isfinite(peak_N)
    model_NV -= torch.where(sound_N, peak_N, 0.0)[:, None]
    plain = temperature in (0, 1) and filters == (None, None, None)
    drawn_NV = model_NV if plain else _filtered(model_NV, temperature, filters)
    weights = _Weights(model_NV, tile, into=weight_NV)
    drawn = weights if plain else _Weights(drawn_NV, tile, into=torch.empty_like(drawn_NV))
    token_N = drawn.relative_NV.argmax(1) if temperature == 0 else drawn.reservoir(counter)
    measured = drawn if measure == "drawn" else weights
    log_prob_N, entropy_N, margin_N = measured.figures(token_N)
    nan = torch.full_like(log_prob_N, torch.nan)
    return Draw(
        torch.where(sound_N, token_N, _lowest_permitted(len(logits_NV), forbidden, span, token_N)),
        torch.where(sound_N, log_prob_N, nan),
        torch.where(sound_N, entropy_N, nan),
        torch.where(sound_N, margin_N, nan),
    )


class _Weights:
    """exp of one chunk of logits relative to the rows' maxima, with the mass of each tile.

    `relative_NV` is written over, and the weights are written `into` another such tensor.
    """

    def __init__(self, relative_NV: Tensor, tile: int, *, into: Tensor) -> None:
        self.tile = tile
        self.relative_NV = relative_NV.clamp_(min=LOWEST)
        rows, columns = relative_NV.shape
        self.weight_NTK = torch.exp(self.relative_NV, out=into).view(rows, columns // tile, tile)
        self.mass_NT = self.weight_NTK.sum(2).double()
        self.total_N = self.mass_NT.sum(1)

    def reservoir(self, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """The drawn ids, (N,): the last accepted tile, then inverse CDF inside it."""
        tiles = self.mass_NT.shape[1]
        lane_T = torch.arange(tiles, device=self.mass_NT.device) + (philox.DRAW << 24)
        seed_N1, position_N1, sample_N1, step_N1 = (c[:, None] for c in counter)
        accept_NT, pick_NT, _, _ = philox.words(seed_N1, position_N1, sample_N1, step_N1, lane_T)
        so_far_NT = self.mass_NT.cumsum(1)
        accepted_NT = philox.to_uniform(accept_NT) * so_far_NT < self.mass_NT
        index_T = torch.arange(tiles, device=self.mass_NT.device)
        winner_N = torch.where(accepted_NT, index_T, 0).amax(1)
        weight_NK = self.weight_NTK.gather(1, winner_N[:, None, None].expand(-1, 1, self.tile))[
            :, 0
        ]
        cumulative_NK = weight_NK.double().cumsum(1)
        pick_N = philox.to_uniform(pick_NT.gather(1, winner_N[:, None]))
        inside_N = torch.searchsorted(cumulative_NK, pick_N * cumulative_NK[:, -1:], right=True)
        return winner_N * self.tile + inside_N[:, 0].clamp(max=self.tile - 1)

    def figures(self, token_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of the tokens, entropy and margin p1 - p2, each (N,), nats."""
        kind = self.relative_NV.dtype
        log_total_N = self.total_N.log()
        relative_N = self.relative_NV.gather(1, token_N[:, None])[:, 0]
        # The logits are not read again: their memory takes the products.
        product_NTK = self.relative_NV.mul_(self.weight_NTK.view_as(self.relative_NV))
        moment_N = product_NTK.view_as(self.weight_NTK).sum(2).double().sum(1)
        best_NT = self.weight_NTK.amax(2)
        first_N, tile_N = best_NT.max(1)
        rest_NT = best_NT.scatter(1, tile_N[:, None], 0)
        within_NK = self.weight_NTK.gather(1, tile_N[:, None, None].expand(-1, 1, self.tile))[:, 0]
        second_N = within_NK.scatter(1, within_NK.argmax(1, keepdim=True), 0).amax(1)
        second_N = torch.maximum(second_N, rest_NT.amax(1))
        return (
            (relative_N.double() - log_total_N).to(kind),
            (log_total_N - moment_N / self.total_N).to(kind),
            ((first_N - second_N).double() / self.total_N).to(kind),
        )


def _filtered(
    relative_NV: Tensor,
    temperature: float,
    filters: tuple[int | None, float | None, float | None],
) -> Tensor:
    """The logits that are drawn from: after temperature (0 counts as 1) and the filters."""
    heat = min(max(temperature, COLDEST), HOTTEST) if temperature > 0 else 1.0
    scaled_NV = relative_NV / heat
    return scaled_NV.masked_fill_(~kept_columns(scaled_NV, *filters), -torch.inf)


def _lowest_permitted(
    rows: int, forbidden: tuple[int, ...], span: Tensor | None, like_N: Tensor
) -> Tensor:
    """The lowest id that each row may draw, (N,) int64."""
    lowest_N = torch.zeros_like(like_N) if span is None else span[:, 0].clone()
    for column in forbidden:
        lowest_N = torch.where(lowest_N == column, lowest_N + 1, lowest_N)
    return lowest_N
