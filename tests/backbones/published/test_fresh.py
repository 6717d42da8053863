"""Models of published families made from their config alone: no value is left undefined."""

from __future__ import annotations

import json

import pytest
import torch
from folders import GOLDEN
from safetensors.torch import load_file

from mdiff.find import find
from mdiff.pipeline.published import family_of

FOLDERS = [
    path
    for path in sorted([*GOLDEN.iterdir(), GOLDEN / "amused" / "transformer"])
    if (path / "config.json").exists()
    and family_of(json.loads((path / "config.json").read_text())) is not None
]
# Of no float: a pattern that no table holds.
ODD = -77


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty gives NaN, or ODD of whole numbers."""
    plain = torch.empty

    def empty(*shape, **options):
        made = plain(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else ODD)

    monkeypatch.setattr(torch, "empty", empty)


def fresh(folder):
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(3)
    return find("backbones", family_of(config))(config)


def test_every_family_with_a_golden_is_made_here():
    assert len({family_of(json.loads((f / "config.json").read_text())) for f in FOLDERS}) >= 10


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_fresh_model_reads_no_memory_that_was_not_written(folder, poisoned):
    first, again = fresh(folder), fresh(folder)
    for (name, tensor), other in zip(first.state_dict().items(), again.state_dict().values()):
        assert bool(tensor.isfinite().all()), name
        assert not bool((tensor == ODD).any()), name
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_that_files_hold_are_those_that_a_fresh_model_has(folder):
    stored = load_file(next(path for path in folder.glob("*.safetensors") if "model" in path.name))
    for name, table in fresh(folder).named_buffers():
        # The bias of a router is learnt.
        if name in stored and not name.endswith("expert_bias"):
            assert torch.allclose(table.float(), stored[name].float(), atol=1e-6), name
