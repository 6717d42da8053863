"""Features of items: means over the given positions, and an exact share that is hidden."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from toys import HashDenoiser

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.errors import ConfigError, DataError
from mdiff.modalities.text.modality import text
from mdiff.pipeline.features import features
from mdiff.pipeline.pipeline import Pipeline
from mdiff.schedule import Cosine
from mdiff.tokens import TokenSpace

SPACE = TokenSpace(6, mask_id=6)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(**options):
    torch.manual_seed(0)
    model = transformer(vocab_size=6, width=16, depth=3, heads=2, init_std=0.3, **options)
    return Pipeline(model.eval(), SPACE, modality=None, window=8)


class Counter:
    """Features that show the noisy tokens themselves: [1 where hidden, 1 where given, t]."""

    def __init__(self, *, uses_time=False):
        self.uses_time = uses_time
        self.calls = []

    def features(self, tokens, *, at=None, valid=None, t=None, cond=None, layer=None):
        self.calls.append(tokens)
        hidden = (tokens == SPACE.mask_id).double()
        time = torch.zeros_like(hidden) if t is None else t.double()[:, None].expand_as(hidden)
        return torch.stack([hidden, 1 - hidden, time], 2)


def test_features_are_the_mean_over_the_positions():
    pipeline, rows = tiny(), torch.randint(0, 6, (5, 8), generator=random())
    with torch.no_grad():
        for layer in (None, 1, 2, 3):
            shown = pipeline.denoiser.features(rows, layer=layer)
            found = features(pipeline, rows, layer=layer, batch_size=2)
            assert found.dtype == torch.float32
            assert torch.allclose(found, shown.mean(1), atol=1e-6)
            assert not found.requires_grad


def test_the_layers_are_the_streams_between_the_blocks():
    model, rows = tiny().denoiser, torch.randint(0, 6, (2, 8), generator=random())
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _given, stream: streams.append(stream))
    with torch.no_grad():
        last = model.features(rows)
        passed = list(streams)
        assert torch.equal(last, model.norm(passed[-1]))
        at = torch.rand(rows.shape, generator=random(1)) < 0.4
        for layer, stream in enumerate(passed, 1):
            streams.clear()
            assert torch.equal(model.features(rows, layer=layer), stream)
            # What comes after the layer is not run.
            assert len(streams) == layer
            assert torch.allclose(model.features(rows, layer=layer, at=at), stream[at], atol=1e-6)
        for layer in (0, 4, -1):
            with pytest.raises(ConfigError, match="1 to 3"):
                model.features(rows, layer=layer)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_exactly_the_given_share_of_the_given_positions_is_hidden(ratio):
    rows = torch.randint(0, 6, (40, 20), generator=random())
    rows[:, ::3] = SPACE.mask_id
    given = int((rows[0] != SPACE.mask_id).sum())
    pipeline = Pipeline(Counter(), SPACE, modality=None)
    found = features(pipeline, rows, mask_ratio=ratio)
    share = torch.full((40,), round(ratio * given) / given)
    # Positions that the row itself leaves hidden are in no mean.
    assert torch.allclose(found[:, 0], share)
    assert torch.allclose(found[:, 1], 1 - share)


def test_hidden_positions_depend_on_the_seed_and_the_row_and_not_on_the_batch():
    rows, denoiser = torch.randint(0, 6, (9, 8), generator=random()), Counter()
    pipeline = Pipeline(denoiser, SPACE, modality=None)
    for size in (9, 4, 1):
        features(pipeline, rows, mask_ratio=0.5, batch_size=size, seed=3)
    whole, parts, ones = (torch.cat(denoiser.calls[a:b]) for a, b in ((0, 1), (1, 4), (4, 13)))
    assert torch.equal(whole, parts)
    assert torch.equal(whole, ones)
    features(pipeline, rows, mask_ratio=0.5, seed=4)
    assert not torch.equal(denoiser.calls[-1], whole)
    hidden = whole == SPACE.mask_id
    assert len(hidden.unique(dim=0)) > 1


def test_a_denoiser_that_uses_the_time_gets_the_one_of_the_share():
    rows = torch.randint(0, 6, (3, 8), generator=random())
    pipeline = Pipeline(Counter(uses_time=True), SPACE, modality=None, schedule=Cosine())
    found = features(pipeline, rows, mask_ratio=0.5)
    assert torch.allclose(found[:, 2], torch.full((3,), 1 / 3))
    assert bool((features(pipeline, rows)[:, 2] < 1e-3).all())


def test_rows_of_different_lengths_are_not_changed_by_padding():
    pipeline, rows = tiny(), [[1, 2, 3], [4, 5, 0, 1, 2, 3, 4], [5]]
    together = features(pipeline, rows)
    alone = torch.cat([features(pipeline, [row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_pipeline_shows_features_of_items_and_of_tokens():
    torch.manual_seed(0)
    modality = text()
    model = transformer(vocab_size=256, width=16, depth=2, heads=2).eval()
    pipeline = Pipeline(model, modality.space, modality, window=8)
    tokens = torch.tensor([modality.encode("abcd"), modality.encode("dcba")])
    found = pipeline.features(["abcd", "dcba"], layer=1)
    assert torch.equal(found, pipeline.features(tokens, layer=1))
    assert torch.equal(found[:1], pipeline.features("abcd", layer=1))
    at = torch.tensor([[True, False, False, True], [False, False, True, False]])
    assert pipeline.features(tokens, at=at).shape == (3, 16)
    with pytest.raises(ConfigError, match="tokens"):
        pipeline.features(["abcd"], at=at)


def test_features_refuse_invalid_arguments():
    pipeline, rows = tiny(), torch.zeros(2, 8, dtype=torch.int64)
    for options in ({"mask_ratio": 1.1}, {"mask_ratio": -0.1}, {"layer": 4}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            features(pipeline, rows, **options)
    with pytest.raises(DataError, match="row 1 gives no token"):
        features(pipeline, [[1, 2], [6, 6]])
    with pytest.raises(DataError, match="no items"):
        features(pipeline, [])
    with pytest.raises(ConfigError, match="no features"):
        features(Pipeline(HashDenoiser(SPACE), SPACE, modality=None), rows)


# Images as items, where labels are a condition.


def forms_of(pixels):
    """One image in every form that it may be given in."""
    return {
        "array": pixels, "channels last": pixels[..., None], "tensor": torch.from_numpy(pixels),
        "image": Image.fromarray(pixels), "mapping": {"image": pixels},
        "colour": np.stack([pixels] * 3, 2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def fashion():
    return mdiff.load("builtin:fashion")


@pytest.mark.parametrize("form", forms_of(np.zeros((1, 1), np.uint8)))
def test_an_image_scores_alone_in_a_list_and_in_an_array_without_its_label(fashion, form, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 17, (28, 28), dtype=np.uint8) * 15
    item = forms_of(pixels)[form]
    expected = fashion.score([{"image": pixels}], draws=2).nats
    assert torch.equal(fashion.score(item, draws=2).nats, expected)
    assert torch.equal(fashion.score([item], draws=2).nats, expected)
    several = fashion.score([item, {"image": pixels, "label": 3}], draws=2).nats
    assert several[0] == expected[0] != several[1]
    assert torch.equal(fashion.features(item), fashion.features([{"image": pixels}]))


def test_a_path_is_an_image_and_an_array_may_hold_several(fashion, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 17, (2, 28, 28), dtype=np.uint8) * 15
    Image.fromarray(pixels[0]).save(tmp_path / "x.png")
    expected = fashion.score(list(pixels), draws=2).nats
    assert torch.equal(fashion.score(pixels, draws=2).nats, expected)
    for path in (tmp_path / "x.png", str(tmp_path / "x.png")):
        assert torch.equal(fashion.score(path, draws=2).nats, expected[:1])
        assert fashion.features(path).shape == (1, 192)
    assert torch.equal(fashion.features(pixels), fashion.features(list(pixels)))
