"""Evaluation of models of pictures: bounds by what is given, figures of samples, the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from folders import ROOT

import mdiff.evaluation.image_metrics
from mdiff.backbones.transformer import transformer
from mdiff.cli import run
from mdiff.denoiser import from_logits
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.evaluation.classifier import Classifier, load_classifier
from mdiff.evaluation.images import (
    Drawn,
    conditional_bounds,
    draw_pictures,
    figures_of,
    picture_canvases,
    probe_figures,
    spread,
    with_model_labels,
)
from mdiff.modalities.image.codecs.kmeans import kmeans
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.data.images import Pictures
from mdiff.modalities.image.modality import image
from mdiff.modalities.text.modality import text
from mdiff.pipeline.pipeline import Pipeline

SIZE = (8, 8)
NAMES = ["ant", "bee", "cat"]
SHIPPED = ROOT / "benchmarks" / "classifier"


def pictures(count=30, *, seed=0):
    """Noise in four greys whose mean tells the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = torch.randint(0, 2, (count, 1, *SIZE), generator=generator)
    pixels = (pixels + labels[:, None, None, None]) * 60
    names = [str(i) for i in range(count)]
    return Pictures(pixels.to(torch.uint8), names, labels, list(NAMES))


def modality(label="condition", codec=None):
    return image(codec=codec or levels(levels=4, step=60), size=SIZE, label=label, labels=NAMES)


def pipeline(made, **options):
    torch.manual_seed(0)
    space = made.space
    model = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, layout=made.layout, width=16, depth=2,
        heads=2, classes=made.classes, init_std=0.3, **options,
    )  # fmt: skip
    return Pipeline(model.eval(), space, made, window=made.length)


def uniform(made):
    ids = made.space.vocab_size
    even = from_logits(lambda tokens: torch.zeros(*tokens.shape, ids))
    return Pipeline(even, made.space, made, window=made.length)


# bounds


def test_each_conditional_of_a_uniform_model_costs_the_log_of_its_ids():
    made = modality("part")
    rows = made.examples(pictures(), split="all")
    # Other estimators are right in the mean: how many labels they hide is random.
    found = conditional_bounds(uniform(made), rows, estimator="left_to_right")
    assert [(bound["of"], bound["given"]) for bound in found] == [
        ("image+label", ""), ("label", "image"), ("image", "label"),
    ]  # fmt: skip
    cost = {"image": 64 * math.log2(4), "label": math.log2(3)}
    counts = {"image": 64, "label": 1}
    for bound in found:
        of = bound["of"].split("+")
        assert bound["bits_per_picture"] == pytest.approx(sum(cost[name] for name in of))
        assert bound["tokens"] == 30 * sum(counts[name] for name in of)
        assert bound["bits_per_token"] == pytest.approx(
            30 * sum(map(cost.get, of)) / bound["tokens"]
        )
        assert ("bits_per_dim" in bound) == (of == ["image"])
    assert found[2]["bits_per_dim"] == pytest.approx(2)


def test_bits_per_dim_are_of_pixel_values_alone():
    data = pictures()
    lossless = modality("none")
    (found,) = conditional_bounds(uniform(lossless), lossless.examples(data, split="all"), draws=2)
    assert found["bits_per_dim"] == pytest.approx(2)
    assert "bits_per_code_pixel" not in found
    lossy = modality("none", kmeans(stride=2, codebook_size=8, channels=1).fit(data.pixels))
    (found,) = conditional_bounds(uniform(lossy), lossy.examples(data, split="all"), draws=2)
    # One code of three bits for four pixels.
    assert found["bits_per_code_pixel"] == pytest.approx(3 / 4)
    assert "bits_per_dim" not in found


def test_the_condition_is_named_and_used():
    made = modality()
    model = pipeline(made, condition_width=8)
    # adaLN starts as the identity: only then does the label matter.
    torch.nn.init.normal_(model.denoiser.modulation.weight, std=1.0)
    data = pictures()
    rows = made.examples(data, split="all")
    (bound,) = conditional_bounds(model, rows, draws=2)
    assert (bound["of"], bound["given"]) == ("image", "label")
    rows.cond["label"] = (rows.cond["label"] + 1) % 3
    (other,) = conditional_bounds(model, rows, draws=2)
    assert bound["bits_per_picture"] != pytest.approx(other["bits_per_picture"], rel=1e-6)


def test_bounds_of_pictures_do_not_depend_on_the_batch():
    made = modality()
    model, rows = pipeline(made), made.examples(pictures(), split="all")
    one, other = (conditional_bounds(model, rows, draws=2, batch_size=size)[0] for size in (30, 7))
    assert one["bits_per_token"] == pytest.approx(other["bits_per_token"], rel=1e-5)


# labels, samples, probes


def test_labels_are_looked_up_by_name_and_numbers_are_the_models_own():
    made, data = modality(), pictures()
    turned = Pictures(data.pixels, data.names, data.labels, ["Cat", "ant", "bee"])
    found = with_model_labels(turned, made)
    assert found.labels.tolist()[:3] == [2, 0, 1]
    assert with_model_labels(found, made).labels.tolist() == found.labels.tolist()
    numbered = Pictures(data.pixels, data.names, data.labels, ["0", "1", "2"])
    assert with_model_labels(numbered, made).labels.tolist() == data.labels.tolist()
    for names in (["ant", "bee", "catt"], ["0", "1", "2", "3"]):
        with pytest.raises(DataError):
            with_model_labels(Pictures(data.pixels, data.names, data.labels, names), made)


def test_a_limit_keeps_sorted_labels_in_proportion():
    data = pictures(90)
    order = data.labels.argsort(stable=True)
    few = spread(data.at(order), 9)
    assert few.labels.bincount().tolist() == [3, 3, 3]
    assert len(spread(data, 0)) == len(spread(data, 500)) == 90


def test_samples_ask_for_each_label_in_turn():
    drawn = draw_pictures(pipeline(modality()), 7, sampler="confidence", steps=2)
    assert drawn.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert drawn.pictures.shape == (7, 1, *SIZE)
    assert drawn.pictures.dtype == torch.uint8
    assert drawn.calls == 2


def a_classifier():
    torch.manual_seed(0)
    return Classifier(size=SIZE, channels=1, labels=["cat", "ant", "bee"]).eval()


def test_training_pictures_as_samples_are_recognised_as_copies():
    made, train, test = modality(), pictures(60, seed=1), pictures(60, seed=2)
    drawn = Drawn(train.pixels, train.labels, calls=1.0, seconds=0.0)
    classifier = a_classifier()
    found = figures_of(
        drawn, pipeline(made), train=train, test=test, classifier=classifier,
        metrics=("frechet", "classifier", "diversity", "nearest"),
    )  # fmt: skip
    assert found["nearest"]["samples"] == 0
    assert found["nearest"]["test"] > 0.5
    assert found["diversity"] == pytest.approx(1, abs=0.05)
    assert found["frechet"]["distance"] == pytest.approx(found["frechet"]["of_training_pictures"])
    assert "64 features" in found["frechet"]["space"]
    # The classifier numbers its labels in its own way.
    asked = torch.tensor([1, 2, 0])[train.labels]
    right = (classifier.logits(train.pixels).argmax(1) == asked).double().mean()
    assert found["classifier"]["agreement"] == pytest.approx(float(right))


def test_a_frechet_distance_is_called_fid_only_with_inception(monkeypatch):
    made, data = modality(), pictures(60)
    drawn = Drawn(data.pixels, data.labels, calls=1.0, seconds=0.0)
    options = {"train": data, "test": data, "metrics": ("frechet",)}
    found = figures_of(drawn, pipeline(made), **options)["frechet"]
    assert (found["space"], "fid" in found) == ("pixels averaged to 8 x 8", False)
    monkeypatch.setattr(
        "mdiff.evaluation.images.inception_features",
        lambda pixels, *, weights: pixels.flatten(1)[:, :9].float(),
    )
    found = figures_of(drawn, pipeline(made), inception="weights", **options)["frechet"]
    assert (found["space"], "distance" in found) == ("Inception", False)


def test_the_classifier_has_to_be_there_and_to_know_the_labels():
    made, data = modality(), pictures()
    drawn = Drawn(data.pixels, data.labels, calls=1.0, seconds=0.0)
    options = {"train": data, "test": data, "metrics": ("classifier",)}
    with pytest.raises(ConfigError, match="needs a classifier"):
        figures_of(drawn, pipeline(made), **options)
    other = Classifier(size=SIZE, channels=1, labels=["ant", "bee", "dog"])
    with pytest.raises(DataError, match="knows no 'cat'"):
        figures_of(drawn, pipeline(made), classifier=other, **options)
    with pytest.raises(ConfigError, match="asked for a label"):
        figures_of(drawn, pipeline(modality("none")), classifier=a_classifier(), **options)


def test_a_probe_reads_what_the_pictures_show_and_never_the_label_itself():
    made, train, test = modality("part"), pictures(90, seed=1), pictures(60, seed=2)
    model = pipeline(made)
    canvases = picture_canvases(model, test.pixels)
    assert bool((canvases[:, made.span("label")] == model.space.mask_id).all())
    found = probe_figures(model, train=train, test=test, mask_ratio=0.25, layer=1)
    assert found["linear"] == 1.0
    assert found["commonest_label"] == pytest.approx(1 / 3)
    # Noise without labels in it: 60 guesses, 6 deviations, false alarm 2e-9 a figure.
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    blind = probe_figures(model, train=train, test=Pictures(
        test.pixels, test.names, test.labels[order], test.label_names
    ))  # fmt: skip
    assert abs(blind["linear"] - 1 / 3) < 6 * math.sqrt(2 / 9 / 60)
    with pytest.raises(DataError, match="no labels"):
        probe_figures(model, train=train, test=Pictures(test.pixels, test.names))


def test_features_of_pictures_are_those_of_their_canvases():
    made, data = modality("part"), pictures(4)
    model = pipeline(made)
    shown = [{"image": pixels[0].numpy()} for pixels in data.pixels]
    found = model.features(shown, layer=1)
    assert torch.allclose(found, model.features(picture_canvases(model, data.pixels), layer=1))
    labelled = [one | {"label": "ant"} for one in shown]
    assert not torch.allclose(model.features(labelled, layer=1), found)


# the classifier


def test_a_classifier_comes_back_as_it_was(tmp_path):
    classifier, data = a_classifier(), pictures()
    classifier.save(tmp_path / "classifier", card={"what": "a test"})
    again = load_classifier(tmp_path / "classifier")
    assert torch.equal(again.logits(data.pixels), classifier.logits(data.pixels))
    assert again.features(data.pixels).shape == (30, 64)
    with pytest.raises(DataError, match="takes"):
        again.logits(data.pixels[:, :, :4])
    card = tmp_path / "classifier" / "card.json"
    card.write_text(card.read_text().replace('"cat",', ""))
    with pytest.raises(CheckpointError, match="card"):
        load_classifier(tmp_path / "classifier")


def test_the_shipped_classifier_is_small_and_says_how_good_it_is():
    classifier = load_classifier(SHIPPED)
    assert (classifier.size, len(classifier.labels)) == ((28, 28), 10)
    assert json.loads((SHIPPED / "card.json").read_text())["test_accuracy"] >= 0.90
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2**20


# the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A saved model, a file of pictures, a classifier."""
    folder = tmp_path_factory.mktemp("world")
    pipeline(modality()).save(folder / "model")
    pipeline(modality("none", kmeans(stride=2, codebook_size=8, channels=1).fit(
        pictures().pixels
    ))).save(folder / "lossy")  # fmt: skip
    data = pictures(80)
    np.savez(folder / "data.npz", x=data.pixels[:, 0].numpy(), y=data.labels.numpy())
    a_classifier().save(folder / "classifier", card={})
    return folder


def evaluated(world, *words, model="model"):
    return ["eval", str(world / model), "--data", str(world / "data.npz"), "--draws", "2", *words]


def test_eval_reports_every_metric_of_pictures(world, capsys):
    words = evaluated(
        world, "--metrics", "bound,frechet,classifier,diversity,nearest,probe", "--classifier",
        str(world / "classifier"), "--holdout", "0.3", "--samples", "12", "--sampler", "halton",
        "--steps", "3", "--guidance-scale", "2",
    )  # fmt: skip
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["pictures"]) == ("holdout", 24)
    (bound,) = found["bounds"]
    assert bound["bits_per_dim"] == bound["bits_per_token"] > 0
    assert bound["bits_per_dim_stderr"] > 0
    assert 0 <= found["probe"]["linear"] <= 1
    assert found["probe"]["training_pictures"] == 56
    drawn = found["of_samples"]
    # Guided calls cost two evaluations.
    assert (drawn["samples"], drawn["calls"], drawn["sampler"]) == (12, 6, "halton")
    assert set(drawn["frechet"]) == {"distance", "of_training_pictures", "space"}
    assert set(drawn) >= {"classifier", "diversity", "nearest"}
    assert run(words) == 0
    shown = capsys.readouterr().out
    for piece in ("bits per dim", "Frechet distance", "classifier", "diversity", "probe: linear"):
        assert piece in shown


def test_eval_of_a_lossy_codec_shows_its_code_beside_its_loss(world, capsys):
    assert run(evaluated(world, model="lossy")) == 0
    shown = capsys.readouterr().out
    assert "bits per pixel (of the code)" in shown
    assert "the codec's PSNR" in shown
    assert "dim" not in shown


def test_eval_of_the_same_seed_is_the_same_at_any_batch_size(world, capsys):
    bits = []
    for size in ("32", "5"):
        assert run(evaluated(world, "--split", "all", "--batch-size", size, "--json")) == 0
        bits.append(json.loads(capsys.readouterr().out)["bounds"][0]["bits_per_token"])
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--metrics", "bound,frechett"], 2, "did you mean 'frechet'"),
        (["--metrics", "fid"], 2, "unknown metric 'fid'"),
        (["--metrics", "classifier"], 2, "--classifier"),
        (["--metrics", "frechet", "--samples", "1"], 2, "at least 2"),
        (["--metrics", "frechet", "--sampler", "haltn"], 2, "halton"),
        (["--metrics", "frechet", "--samples", "4", "--inception", "no.pth"], 5, "pip install"),
        (["--metrics", "classifier", "--classifier", "/no/where"], 4, "no/where"),
        (["--metrics", "probe", "--layer", "3"], 2, "layers 1 to 2"),
        (["--metrics", "probe", "--mask-ratio", "2"], 2, "mask_ratio=2"),
        (["--window", "4"], 2, "--window"),
        (["--split", "trian"], 2, "did you mean 'train'"),
    ],
)
def test_bad_options_of_eval_for_pictures_are_one_line(
    world, words, code, message, capsys, monkeypatch
):
    monkeypatch.setattr(mdiff.evaluation.image_metrics, "find_spec", lambda name: None)
    assert run(evaluated(world, *words)) == code
    caught = capsys.readouterr()
    last = caught.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_text_has_no_picture_metrics(tmp_path, capsys):
    made = text()
    torch.manual_seed(0)
    model = transformer(vocab_size=256, width=16, depth=1, heads=2)
    Pipeline(model.eval(), made.space, made, window=16).save(tmp_path / "model")
    (tmp_path / "story.txt").write_text("once upon a time" * 9)
    words = ["eval", str(tmp_path / "model"), "--data", str(tmp_path / "story.txt")]
    assert run([*words, "--metrics", "frechet"]) == 2
    assert "bound alone" in capsys.readouterr().err


def test_a_damaged_classifier_gives_no_figure():
    damaged = Classifier(size=SIZE, channels=1, labels=["cat", "ant"]).eval()
    with torch.no_grad():
        damaged.inner.weight[0, 0] = torch.nan
    pictures = torch.zeros(2, 1, *SIZE, dtype=torch.uint8)
    for figures in (damaged.logits, damaged.features):
        with pytest.raises(CheckpointError, match="not finite"):
            figures(pictures)
