"""The log-probability of a token that stands beside a draw, without a second read of its row."""

import pytest
import torch

from mdiff.kernels.reference import guided_logits, permitted_columns
from mdiff.ops import bind_draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("filters", [{}, {"temperature": 0.0}, {"top_k": 2, "temperature": 3.0}])
def test_a_standing_token_has_the_log_probability_of_the_whole_row(dtype, guided, filters):
    generator = torch.Generator().manual_seed(3)
    rows, columns, never = 60, 37, (4, 20)
    logits, other = (4 * torch.randn(2, rows, columns, generator=generator)).to(dtype)
    logits[:, 7] = -torch.inf
    standing = torch.arange(rows) % (columns + 1)
    span = torch.tensor([[0, 37], [3, 30]])[torch.arange(rows) % 2]
    zero = torch.zeros(rows, dtype=torch.int64)
    other[:, 7] = -torch.inf
    more = {"unconditional": other, "scale": torch.full((rows,), 1.7, dtype=torch.float64)}
    _, found = bind_draw(columns, never=never, **filters).of_features(
        logits, None, standing=standing, seed=zero, sample=zero, step=zero,
        position=torch.arange(rows), span=span, **more if guided else {"scale": None},
    )  # fmt: skip
    whole = logits.double()
    if guided:
        whole = guided_logits(whole, other.double(), more["scale"])
    whole[~permitted_columns(whole, never, span)] = -torch.inf
    has_column = standing < columns
    expected = whole.log_softmax(1)[has_column].gather(1, standing[has_column, None])[:, 0]
    assert torch.equal(found[has_column] == -torch.inf, expected == -torch.inf)
    finite = expected.isfinite()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert (found[has_column] - expected)[finite].abs().max() < tolerance
