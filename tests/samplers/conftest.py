"""As many canvases as a law needs, few of them in the quick form."""

import pytest
import torch
from revising_toys import LENGTH, MASK


@pytest.fixture(params=[40_000, pytest.param(200_000, marks=pytest.mark.slow)], ids=str)
def masks(request):
    """As many canvases of masks as there are samples of a law."""
    return torch.full((request.param, LENGTH), MASK)
