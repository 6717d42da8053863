"""Whatever `Pipeline.save` writes, `load` gives back; what it would not, is refused unwritten."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from denoisers import KINDS, kind_of, plain
from torch import nn
from torch.optim.swa_utils import AveragedModel

import mdiff
from mdiff import CheckpointError, ConfigError, TokenSpace, from_logits
from mdiff.denoiser import guided
from mdiff.modalities.ids import ids

WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled in parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}
# Loading it to generate is refused, by its own noise.
SAVED = [name for name in KINDS if name != "gidd"]


def assert_the_same(kind, pipeline):
    """The same tokens; figures but for the last bits, as memory is aligned otherwise."""
    expected = kind.pipeline.generate(kind.prompt, **kind.options, seed=3)
    found = pipeline.generate(kind.prompt, **kind.options, seed=3)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.log_prob == pytest.approx(theirs.log_prob, rel=1e-5)
    for ours, theirs in zip(weights(pipeline), weights(kind.pipeline), strict=True):
        assert torch.equal(ours, theirs)


def weights(pipeline):
    return [tensor for _, tensor in sorted(pipeline.denoiser.state_dict().items())]


@pytest.mark.parametrize("name", SAVED)
def test_a_model_of_each_kind_comes_back(name, tmp_path):
    kind = kind_of(name)
    kind.pipeline.save(tmp_path / "model")
    mask_id = {"mask_id": kind.pipeline.space.mask_id} if name.endswith("_moe") else {}
    again = mdiff.load(tmp_path / "model", device="cpu", **mask_id)
    assert_the_same(kind, again)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["transformer", "masked lm bert", "mdlm"])
def test_a_wrapped_model_is_saved_as_the_model_inside(name, wrapper, tmp_path):
    kind = kind_of(name)
    wrapped = WRAPPERS[wrapper](kind.pipeline.denoiser)
    dataclasses.replace(kind.pipeline, denoiser=wrapped).save(tmp_path / "model")
    again = mdiff.load(tmp_path / "model", device="cpu")
    assert_the_same(kind, again)


class Stranger(nn.Module):
    """A denoiser with files of its own, and of no file in backbones/."""

    uses_time = False

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, tokens, **_):
        return self.weight.expand(*tokens.shape, 3)

    def save_pretrained(self, directory, *, state_dict=None):
        raise AssertionError("it is not asked to write")


@pytest.mark.parametrize("outside", [True, False])
def test_adapters_are_to_be_merged_first(outside, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules="all-linear")
    pipeline = plain().pipeline
    # Around the denoiser, or injected into its layers.
    made = peft.get_peft_model(pipeline.denoiser, settings)
    denoiser = made if outside else made.get_base_model()
    with pytest.raises(ConfigError, match="merge_and_unload"):
        dataclasses.replace(pipeline, denoiser=denoiser).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    made.merge_and_unload()
    dataclasses.replace(pipeline, denoiser=made.get_base_model()).save(tmp_path / "model")
    mdiff.load(tmp_path / "model", device="cpu")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"denoiser": Stranger()}, "of no file in backbones/"),
        ({"denoiser": torch.compile(Stranger(), backend="eager")}, "of no file in backbones/"),
        ({"denoiser": from_logits(lambda tokens: tokens)}, "FromLogits cannot be saved"),
        ({"space": TokenSpace(20, mask_id=20)}, "cannot be saved together"),
        ({"modality": ids(vocab_size=9, mask_id=9)}, "cannot be saved together"),
    ],
)
def test_what_load_would_not_take_is_refused_before_anything_is_written(changed, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        dataclasses.replace(plain().pipeline, **changed).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_guidance_is_a_denoiser_without_files(tmp_path):
    pipeline = plain().pipeline
    around = guided(pipeline.denoiser, guidance_scale=2.0, hide="given", space=pipeline.space)
    with pytest.raises(ConfigError, match="Guided cannot be saved"):
        dataclasses.replace(pipeline, denoiser=around).save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_never_written_over(tmp_path):
    plain().pipeline.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="exists"):
        plain().pipeline.save(tmp_path / "model")
