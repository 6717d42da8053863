"""The modality of pictures: canvases with parts, conditions, what comes back; and edits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.data.examples import variants
from mdiff.modalities.image.data.images import Pictures, split_index
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.inpainting import box_mask, hidden_share, touched
from mdiff.modalities.image.modality import image
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.encoding import write_shards
from mdiff.pipeline.pipeline import Pipeline

SIZE = (4, 6)
NAMES = ["ant", "bee", "cat"]


def pictures(count=12, *, channels=1, captions=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 4, (count, channels, *SIZE), generator=generator) * 60
    labels = torch.arange(count) % 3
    said = [f"{NAMES[i]} {n}" for n, i in enumerate(labels.tolist())]
    return Pictures(
        pixels.to(torch.uint8), [str(i) for i in range(count)], labels, list(NAMES),
        said if captions else None,
    )  # fmt: skip


def joint(**options):
    made = image(
        codec=levels(levels=4, step=60), size=SIZE, label="part",
        caption={"length": 8, "vocab_size": 257}, **options,
    )  # fmt: skip
    made.examples(pictures(), split="train")
    return made


def pipeline(modality, **options):
    torch.manual_seed(0)
    space = modality.space
    shape = {"width": 32, "depth": 1, "heads": 2, "init_std": 0.3}
    model = transformer(
        vocab_size=space.vocab_size, mask_id=space.mask_id, layout=modality.layout,
        classes=modality.classes, **(shape | options),
    )  # fmt: skip
    return Pipeline(model.eval(), space, modality, window=modality.length)


def test_the_parts_lie_one_after_the_other_and_a_row_keeps_to_them():
    made = joint()
    assert made.part_names == ("image", "label", "caption")
    assert made.space.parts == ((24, 0, 4), (1, 4, 7), (8, 7, 7 + 257 + 1))
    rows = made.examples(pictures(), split="all")
    batch = rows.batch(torch.arange(12), torch.zeros(12, dtype=torch.int64))
    made.space.check(batch.tokens, masks=False)
    assert rows.length == made.length == 33


def test_a_row_decodes_to_what_it_was_made_of():
    made, data = joint(), pictures()
    row = made.examples(data, split="all").batch(torch.tensor([4]), torch.tensor([0])).tokens[0]
    back = made.decode(row.tolist())
    assert np.array_equal(np.array(back), data.pixels[4, 0].numpy())
    assert back.info == {"label": "bee", "caption": "bee 4"}


def test_any_part_may_be_given_and_the_rest_is_hidden():
    made, mask = joint(), joint().space.mask_id
    canvas = made.canvas({"label": "Cat", "caption": "cat 2"})
    assert canvas[made.span("label")] == [6]
    assert all(token == mask for token in canvas[made.span("image")])
    assert mask not in canvas[made.span("caption")]
    picture = pictures().pixels[0, 0].numpy()
    assert mask not in made.canvas({"image": picture})[made.span("image")]
    assert made.canvas("") == [mask] * made.length
    assert made.canvas("cat 2") == made.canvas({"caption": "cat 2"})


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"label": "catt"}, "did you mean 'cat'"),
        ({"lable": "cat"}, "takes no 'lable'"),
        ({"image": np.zeros((5, 6), dtype=np.uint8)}, "5 x 6"),
        ({"image": np.zeros(SIZE)}, "expected uint8"),
        ({"caption": "a name of far too many letters"}, "at most 8 fit"),
    ],
)
def test_what_does_not_fit_a_canvas_is_refused(prompt, said):
    with pytest.raises(DataError, match=said):
        joint().canvas(prompt)


def test_text_to_picture_captioning_and_classification_are_the_same_call():
    pipe = pipeline(joint())
    picture = pictures().pixels[0, 0].numpy()
    shown = pipe.generate({"image": picture}, n=2, seed=3)
    assert all(np.array_equal(np.array(one.output), picture) for one in shown)
    assert {one.output.info["label"] for one in shown} <= set(NAMES)
    drawn = pipe.generate({"caption": "bee 4", "label": "bee"}, n=2, guidance_scale=2.0)
    assert [one.output.info for one in drawn] == [{"label": "bee", "caption": "bee 4"}] * 2


def test_a_label_is_a_condition_and_the_null_label_stands_for_none():
    made = image(codec=levels(levels=4, step=60), size=SIZE, label="condition")
    made.examples(pictures(captions=False), split="train")
    assert made.classes == 3
    assert made.null_condition["label"].tolist() == [3]
    pipe = pipeline(made)
    with torch.no_grad():
        pipe.denoiser.label.weight.normal_(std=3.0)
        for part in pipe.denoiser.modules():
            if hasattr(part, "modulation") and part.modulation is not None:
                part.modulation.weight.normal_(std=0.5)
    ant, bee = (pipe.generate({"label": name}, seed=5)[0].tokens for name in ("ant", "bee"))
    assert ant != bee
    # A batch of several labels gives each row what it gets alone.
    both = pipe.generate([{"label": "ant"}, {"label": "bee"}], seed=torch.tensor([5, 5]))
    assert [one.tokens for one in both] == [ant, bee]
    guided = pipe.generate({"label": "ant"}, seed=5, guidance_scale=1.0)[0]
    assert guided.tokens == ant
    assert pipe.generate({"label": "ant"}, guidance_scale=2.0)[0].calls == 2 * made.length
    with pytest.raises(ConfigError, match="without a condition"):
        pipe.generate(guidance_scale=2.0)
    with pytest.raises(ConfigError, match="need a guidance_scale"):
        pipe.generate({"label": "ant"}, guidance_schedule="linear")


def test_a_saved_pipeline_of_pictures_comes_back(tmp_path):
    pipe = pipeline(joint())
    pipe.save(tmp_path / "model")
    again = mdiff.load(tmp_path / "model")
    assert again.modality.config() == pipe.modality.config()
    first, second = (p.generate({"label": "bee"}, seed=9)[0] for p in (pipe, again))
    assert first.tokens == second.tokens


def test_a_codec_that_is_not_the_model_s_is_refused(tmp_path):
    pipe = pipeline(joint())
    pipe.save(tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink(missing_ok=True)
    path = tmp_path / "model" / "codec.json"
    path.write_text(path.read_text().replace('"levels": 4', '"levels": 5'))
    with pytest.raises(CheckpointError):
        mdiff.load(tmp_path / "model")


def test_labels_and_captions_that_the_data_lacks_are_asked_for():
    bare = Pictures(pictures().pixels, [str(i) for i in range(12)])
    for options, said in (({"label": "part"}, "no labels"), ({"caption": {}}, "no captions")):
        made = image(codec=levels(levels=4, step=60), size=SIZE, **options)
        with pytest.raises(DataError, match=said):
            made.examples(bare)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label": "conditon"}, "condition"),
        ({"size": [4]}, "two whole numbers"),
        ({"size": [4, 0]}, "two whole numbers"),
        ({"labels": ["a", "A"]}, "different names"),
        ({"caption": {"lenght": 4}}, "length"),
        ({"codec": {"name": "levls"}}, "levels"),
        ({"codec": {"name": "levels", "steps": 3}}, "levels"),
        ({"codec": {}}, "codec.name is missing"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        image(**({"codec": {"name": "levels"}, "size": SIZE} | options))


def test_variants_shift_and_flip_but_not_what_is_called_left():
    data = pictures(3)
    said = ["plain", "leftwards", "plain"]
    data = Pictures(data.pixels, data.names, captions=said)
    shown = variants(data, PictureSource(source="x", shift=1, flip=True))
    assert len(shown) == 18
    assert torch.equal(shown[0], data.pixels)
    assert torch.equal(shown[9][0], data.pixels[0].flip(2))
    assert torch.equal(shown[9][1], data.pixels[1])
    moved = [
        each for each in shown[1:9] if torch.equal(each[0, :, 1:, 1:], data.pixels[0, :, :-1, :-1])
    ]
    assert len(moved) == 1


def test_an_epoch_shows_one_variant_of_each_picture_and_others_later():
    made = image(codec=levels(levels=4, step=60), size=SIZE)
    rows = made.examples(pictures(captions=False), split="train")
    again = rows.batch(torch.arange(5), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(
        again.tokens, rows.batch(torch.arange(5), torch.zeros(5, dtype=torch.int64)).tokens
    )


def test_only_tokens_that_read_the_mask_are_touched():
    codec = levels(levels=4, step=60)
    mask = box_mask("1:3,2:4", SIZE)
    assert torch.equal(touched(codec, mask), mask)

    class Wide:
        stride, receptive_field_margin = 2, 1

    spread = touched(Wide, box_mask("2:3,2:3", (6, 6)))
    assert spread.tolist() == [[True, True, False], [True, True, False], [False, False, False]]
    Wide.receptive_field_margin = None
    own = touched(Wide, box_mask("1:3,2:3", (6, 6)))
    assert own.tolist() == [[False, True, False], [False, True, False], [False] * 3]
    assert bool(touched(Wide, torch.ones(6, 6, dtype=torch.bool)).all())


def test_an_edit_changes_no_pixel_outside_the_mask():
    pipe = pipeline(joint())
    picture = pictures().pixels[2, 0].numpy()
    outside = ~box_mask("1:3,2:5", SIZE).numpy()
    for sampler in ("first_hitting", "confidence", "halton"):
        made = pipe.edit(picture, "1:3,2:5", n=4, sampler=sampler, seed=1)
        arrays = [np.array(one.output) for one in made]
        assert all(np.array_equal(array[outside], picture[outside]) for array in arrays)
        assert any(not np.array_equal(array, picture) for array in arrays)


def test_strength_is_the_exact_share_of_tokens_regenerated():
    pipe = pipeline(image(codec=levels(levels=4, step=60), size=SIZE))
    picture = pictures().pixels[2, 0].numpy()
    assert pipe.edit(picture, strength=1.0)[0].calls == 24
    assert pipe.edit(picture, strength=0.25)[0].calls == 6
    unchanged = pipe.edit(picture, strength=0.0)[0]
    assert unchanged.calls == 0
    assert np.array_equal(np.array(unchanged.output), picture)
    with pytest.raises(ConfigError, match="0 to 1"):
        pipe.edit(picture, strength=1.5)


def test_the_positions_of_a_strength_are_the_sample_s_own():
    may = torch.ones(20, dtype=torch.bool)
    seeds = torch.tensor([1, 2, 3])
    hidden = hidden_share(may, strength=0.5, seeds=seeds)
    assert hidden.sum(1).tolist() == [10, 10, 10]
    assert not torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[2], hidden_share(may, strength=0.5, seeds=seeds[2:])[0])


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        ("1:3", ConfigError, "ROWS,COLUMNS"),
        ("a:b,1:2", ConfigError, "ROWS,COLUMNS"),
        ("0:5,0:2", DataError, "inside 4 rows"),
        ("2:2,0:2", DataError, "not empty"),
        ("-1:2,0:2", DataError, "inside"),
        (np.zeros((4, 6), dtype=bool), DataError, "empty"),
        (np.zeros((4, 5), dtype=bool), DataError, "expected"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused(mask, error, said):
    pipe = pipeline(joint())
    with pytest.raises(error, match=said):
        pipe.edit(pictures().pixels[0, 0].numpy(), mask)


def test_a_pil_image_is_as_good_as_an_array():
    made = joint()
    array = pictures().pixels[0, 0].numpy()
    assert made.canvas({"image": Image.fromarray(array)}) == made.canvas({"image": array})


def test_training_reads_tokens_that_were_written_before(tmp_path):
    data, codec = pictures(), levels(levels=4, step=60)
    write_shards(data, tmp_path / "tokens", codec=codec, rows=5, division=Division(workers=1))
    source = {"source": str(tmp_path / "tokens"), "holdout": 0.25, "captions": "data"}
    options = {"size": SIZE, "label": "part", "caption": {"length": 8, "vocab_size": 257}}
    stored, plain = (image(codec=codec, **options) for _ in range(2))
    for split in ("train", "holdout"):
        rows = stored.examples(source, split=split)
        shares = {"holdout": 0.25, "validation": 0.0}
        plain.examples(data.split("train", **shares), split="all")
        same = plain.examples(data.split(split, **shares), split="all")
        assert torch.equal(rows.tokens, same.tokens)
    other = image(codec=levels(levels=5, step=60), **options)
    with pytest.raises(DataError, match="another codec"):
        other.examples(source)
    with pytest.raises(ConfigError, match="without flip and shift"):
        stored.examples(source | {"flip": True})


def test_labels_are_matched_by_name_however_the_data_number_them():
    data = pictures(captions=False)
    turned = image(
        codec=levels(levels=4, step=60), size=SIZE, label="condition", labels=["cat", "bee", "ant"]
    )
    number = torch.arange(12)
    rows = turned.examples(data, split="all").batch(number, torch.zeros_like(number))
    assert torch.equal(rows.cond["label"], 2 - data.labels)
    other = image(
        codec=levels(levels=4, step=60), size=SIZE, label="condition", labels=["ant", "b"]
    )
    with pytest.raises(DataError, match="unknown label 'bee'"):
        other.examples(data)
    plain = Pictures(data.pixels, data.names, data.labels, ["0", "1", "2"])
    named = turned.examples(plain, split="all").batch(number, torch.zeros_like(number))
    assert torch.equal(named.cond["label"], data.labels)


def test_a_trained_model_reads_held_out_pictures_alone():
    made, data = joint(), pictures()
    outside = next(
        name for name in map(str, range(1000)) if not len(split_index([name], "train", 0.1, 0.0))
    )
    groups = [outside] * len(data)
    held = Pictures(data.pixels, data.names, data.labels, data.label_names, data.captions, groups)
    assert len(made.examples(held, split="all")) == len(data)
    with pytest.raises(DataError, match="train split"):
        image(codec=levels(levels=4, step=60), size=SIZE, caption={"vocab_size": 257}).examples(
            held, split="all"
        )


@pytest.mark.parametrize("strength", [0.0, 0.001])
@pytest.mark.parametrize("mask", [None, "8:24,8:24"])
def test_where_no_token_is_regenerated_the_picture_stays_as_it_was(strength, mask):
    medium = image(codec={"name": "vq", "stride": 2, "codebook_size": 8, "width": 8}, size=[32, 32])
    model = Pipeline(
        mdiff.from_logits(lambda tokens: torch.zeros(*tokens.shape, 8)), medium.space, medium
    )
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    made = model.edit(picture, mask, strength=strength, num_samples=2)
    assert all((np.asarray(each.output) == picture).all() for each in made)
    changed = model.edit(picture, mask, strength=0.3, sampler="halton", steps=1)[0].output
    assert (np.asarray(changed) != picture).any()


def test_captions_that_are_cut_are_counted_in_a_line(caplog):
    said = [*["ant"] * 6, *["an ant and a bee and a cat"] * 6]
    items = pictures(captions=False)
    items = Pictures(items.pixels, items.names, items.labels, items.label_names, said)
    codec = {"name": "levels", "levels": 4, "step": 60}
    medium = image(codec=codec, size=SIZE, caption={"length": 4, "vocab_size": 257})
    medium.examples(items, split="all")
    assert "6 captions are cut at 4 tokens" in caplog.messages
