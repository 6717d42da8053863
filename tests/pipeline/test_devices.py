"""Parts of a published model on devices: planned by size, read there, moved for a call."""

from __future__ import annotations

import pytest
import torch
from folders import GOLDEN as GOLDEN

import mdiff
from mdiff.cli import run
from mdiff.errors import BackendError, CheckpointError, ConfigError
from mdiff.files import read_model_files
from mdiff.pipeline.published import built, load_published, planned, spread


def test_auto_is_one_device_where_the_model_fits():
    pipeline = mdiff.load(GOLDEN / "mdlm", device="auto")
    assert pipeline.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert run(["generate", str(GOLDEN / "mdlm"), "--length", "4", "--device", "auto"]) == 0


def test_a_plan_fills_the_first_device_and_refuses_what_fits_nowhere():
    files = read_model_files(GOLDEN / "mdlm")
    module = built("mdlm", files.config)
    assert planned(module, files, max_memory={"cpu": 10**9}) == {"": "cpu"}
    plan = planned(module, files, max_memory={0: 90_000, "cpu": 10**9})
    assert set(plan.values()) == {0, "cpu"}
    # In half the bytes more of it fits.
    lighter = planned(module, files, dtype=torch.bfloat16, max_memory={0: 90_000, "cpu": 10**9})
    assert lighter == {"": 0} or list(lighter.values()).count(0) > list(plan.values()).count(0)
    with pytest.raises(BackendError, match="larger than the memory"):
        planned(module, files, max_memory={"cpu": 1000})


@pytest.mark.parametrize("name", ["mdlm", "bd3lm", "gidd"])
def test_parts_that_are_moved_for_a_call_give_the_same_logits(name):
    files = read_model_files(GOLDEN / name)
    whole = load_published(files, name).eval()
    module = built(name, files.config)
    parts = {tensor.rpartition(".")[0] or tensor: "cpu" for tensor in module.state_dict()}
    spread(module, files, parts)
    assert module.main_device == torch.device("cpu")
    tokens = torch.arange(12).remainder(9).view(1, 12)
    at = torch.tensor([[True, False] * 6])
    t = torch.full((1,), 0.3)
    with torch.no_grad():
        assert torch.equal(module(tokens, at=at, t=t), whole(tokens, at=at, t=t))


def test_a_map_that_is_incomplete_or_names_no_part_is_refused():
    files = read_model_files(GOLDEN / "mdlm")
    with pytest.raises(CheckpointError, match="has no device in the map"):
        spread(built("mdlm", files.config), files, {"backbone.blocks": "cpu"})
    with pytest.raises(CheckpointError, match="'blocks', which is no part"):
        spread(built("mdlm", files.config), files, {"": "cpu", "blocks": "cpu"})
    with pytest.raises(ConfigError, match="unknown device"):
        mdiff.load(files.folder, device={"": "gpu"})
