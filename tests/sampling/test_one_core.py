"""Text and pictures are trained by one function, which knows neither."""

from __future__ import annotations

import pytest
import torch
from folders import ROOT

from mdiff.objective import diffusion
from mdiff.pipeline.loading import load
from mdiff.training import step as stepping
from mdiff.training.loop import train
from mdiff.training.recipe import load_recipe

SMALL = ["train.steps=20", "train.save_every=20", "train.batch_size=8", "model.width=32",
         "model.depth=1", "model.heads=2", "train.precision=fp32", "log.every=20"]  # fmt: skip
RECIPES = {
    "text": ("configs/text/tiny.yaml", ["data.length=32"]),
    "pictures": ("configs/image/digits.yaml", []),
}


def test_text_and_pictures_are_trained_by_the_very_same_function(tmp_path, monkeypatch):
    the_loss = diffusion.masked_diffusion_loss
    found = []

    def watched(denoiser, tokens, **options):
        found.append((name, options["space"].vocab_size))
        return the_loss(denoiser, tokens, **options)

    assert stepping.diffusion_loss is diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "masked_diffusion_loss", watched)
    losses = {}
    for name, (path, more) in RECIPES.items():
        said: list[str] = []
        recipe = load_recipe(ROOT / path, [*SMALL, *more])
        folder = train(recipe, tmp_path / name, report=said.append)
        losses[name] = [line for line in said if line.startswith("step 20")]
        made = load(folder)
        assert made.generate(n=1, sampler="confidence", steps=2)[0].calls == 2
    assert [n for n, _ in found].count("text") == 20
    assert [n for n, _ in found].count("pictures") == 20
    # 17 greys, and however many tokens the text has: the function knows nothing else.
    assert {size for n, size in found if n == "pictures"} == {17}
    assert all(losses.values())


@pytest.mark.parametrize("split", ["train", "holdout"])
def test_a_label_reaches_the_loss_with_its_row(split):
    from mdiff.modalities.image.modality import image

    made = image(codec={"name": "levels", "levels": 17, "step": 15}, size=[8, 8], label="condition")
    made.examples({"source": "sklearn.digits"}, split="train")
    rows = made.examples({"source": "sklearn.digits"}, split=split)
    number = torch.arange(len(rows))
    labels = rows.batch(number, torch.zeros_like(number)).cond["label"]
    from sklearn.datasets import load_digits

    target = torch.from_numpy(load_digits().target)
    kept = int(len(target) * 0.9)
    assert torch.equal(labels, target[:kept] if split == "train" else target[kept:])
