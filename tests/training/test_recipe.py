"""Recipes are read strictly, and every mistake is one line that names the right key."""

from __future__ import annotations

import copy
import math
from dataclasses import fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdiff.errors import ConfigError
from mdiff.files.yaml import SafeRecipeLoader, parse_yaml
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.text.documents import Source
from mdiff.training.recipe import Recipe, differences, load_recipe, parse_recipe

BASE = {
    "data": {"length": 8, "source": "somewhere"},
    "modality": {"name": "text", "tokenizer": "byte"},
    "model": {"name": "transformer", "width": 16},
    "train": {"steps": 4, "batch_size": 2},
}


def changed(path, value):
    recipe = copy.deepcopy(BASE)
    *sections, key = path.split(".")
    inner = recipe
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[key] = value
    return recipe


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {length: 8, source: somewhere}\nmodality: {name: text}\n"
        "model: {name: transformer, width: 16}\ntrain: {steps: 4, batch_size: 2}\n"
        "optim: {lr: 1e-3, betas: [0.9, 0.99]}\n"
    )
    return path


def test_a_recipe_keeps_free_options_apart_from_known_keys(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.model.name == "transformer"
    assert recipe.model.options == {"width": 16}
    assert recipe.data.options == {"source": "somewhere"}
    assert recipe.optim.lr == 1e-3
    assert recipe.optim.betas == (0.9, 0.99)


def test_a_recipe_survives_being_written_down_as_json():
    recipe = parse_recipe(BASE)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


def test_overrides_replace_values_of_any_section(recipe_file):
    recipe = load_recipe(
        recipe_file,
        ["train.steps=40", "optim.grad_clip=null", "model.depth=2", "log.every=1",
         "objective.schedule.name=cosine"],
    )  # fmt: skip
    assert (recipe.train.steps, recipe.optim.grad_clip, recipe.log.every) == (40, None, 1)
    assert recipe.model.options == {"width": 16, "depth": 2}
    assert recipe.objective.schedule.name == "cosine"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("train.step", 1, "unknown key 'train.step'; did you mean 'train.steps'?"),
        ("steps", 1, "unknown key 'steps'; did you mean 'train.steps'?"),
        ("train.lr", 0.1, "unknown key 'train.lr'; did you mean 'optim.lr'?"),
        ("optim.learning_rate", 1e-4, "did you mean 'optim.lr'?"),
        ("learning_rate", 1e-4, "did you mean 'optim.lr'?"),
        ("train.max_steps", 9, "did you mean 'train.steps'?"),
        ("train.gradient_accumulation_steps", 2, "did you mean 'train.micro_batch'?"),
        ("optim.warmup", 9, "did you mean 'optim.warmup_steps'?"),
        ("train.mixed_precision", "bf16", "did you mean 'train.precision'?"),
        ("optimizer", {}, "unknown key 'optimizer'; did you mean 'optim'?"),
        ("train.steps", "4", "train.steps='4': expected a whole number"),
        ("train.steps", True, "train.steps=True: expected a whole number"),
        ("train.steps", 0, "train.steps=0: expected at least 1"),
        ("train.ema", 1.0, "train.ema=1.0: expected less than 1"),
        ("optim.lr", math.nan, "optim.lr=nan: expected a finite number"),
        ("optim.betas", [0.9], "optim.betas.1 is missing"),
        ("optim.name", "adam", "optim.name='adam': expected 'adamw' or 'muon'"),
        ("objective.weight", "bond", "expected 'bound', 'uniform', 'dynamic' or 'cross_entropy'"),
        ("model", {"width": 3}, "model.name is missing"),
        ("data.length", 0, "data.length=0: expected at least 1"),
        ("log", 3, "log=3"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_key(path, value, message):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(changed(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["", "train", "train.steps", "=3", ".=3", "train..steps=3", "train.steps.a=3"]
)
def test_an_override_that_is_not_section_key_value_is_refused(recipe_file, override):
    with pytest.raises(ConfigError, match="override"):
        load_recipe(recipe_file, [override])


def test_a_recipe_that_is_absent_empty_or_huge_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_recipe(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match="expected sections data, modality"):
        load_recipe(tmp_path / "empty.yaml")
    (tmp_path / "huge.yaml").write_text("a: " + "x" * 2**21)
    with pytest.raises(ConfigError, match="more than"):
        load_recipe(tmp_path / "huge.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("2.5e3", 2500.0), (".5", 0.5), ("3", 3), ("-3", -3),
        ("1_000", 1000), ("1:30", "1:30"), ("2020-01-01", "2020-01-01"), ("010", "010"),
        ("null", None), ("", None), ("true", True), ("'1e-3'", "1e-3"), ("[1, 2]", [1, 2]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
    ],
)  # fmt: skip
def test_values_are_read_as_people_write_them(text, value):
    got = parse_yaml(text.encode(), origin="x")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a: 1\na: 2", "'a' occurs twice"),
        (b"a: {b: 1, b: 2}", "'b' occurs twice"),
        (b"a: &x 1\nb: *x", "aliases"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (b"? [a]\n: 1", "a key must be a word"),
        (b"[" * 10**5, "nested deeper"),
        (b"{", "x: "),
        (b"a: \x00", "not YAML"),
        (b"\xff\xfe\xfd", "not YAML"),
        (b"a: 1\n---\nb: 2", "another document"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, origin="x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_yaml_loader_is_a_safe_one():
    import yaml

    assert issubclass(SafeRecipeLoader, yaml.SafeLoader)
    # Its rules are its own: the loader of everyone else still reads 1:30 as ninety.
    assert yaml.safe_load("1:30") == 90


def test_differences_name_the_dotted_keys_with_both_values():
    old = parse_recipe(BASE)
    new = parse_recipe(changed("optim.lr", 0.5))
    assert differences(old, new) == {"optim.lr": (1e-3, 0.5)}
    longer = parse_recipe(changed("train.steps", 9))
    assert differences(old, longer, ignore=("train.steps",)) == {}
    assert differences(old, parse_recipe(changed("model.depth", 1))) == {"model.depth": (None, 1)}


KEYS = [
    f"{section}.{key}"
    for section, field in Recipe.model_fields.items()
    for key in getattr(field.annotation, "model_fields", {})
]
VALUES = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats()
    | st.text(max_size=12) | st.sampled_from(["[", "{a: 1}", "!!set {a}", "&a b", "1e400", ".nan"])
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(key=st.sampled_from(KEYS) | st.text("abc.=_ \n", max_size=12), value=VALUES, more=VALUES)
def test_any_override_is_a_recipe_or_one_line_of_config_error(tmp_path_factory, key, value, more):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    if not path.exists():
        path.write_text(
            "data: {length: 8}\nmodality: {name: text}\nmodel: {name: transformer}\n"
            "train: {steps: 4, batch_size: 2}\n"
        )
    lines = []
    try:
        recipe = load_recipe(path, [f"{key}={value}", f"model.width={more}"])
        assert parse_recipe(recipe.model_dump(mode="json")).train == recipe.train
    except ConfigError as error:
        lines = str(error).splitlines()
    assert len(lines) <= 1


WRONG = {
    "a number": ("x", True, None, [], {}),
    "a text": (3, True, [], {}),
    "a text or null": (3, True, [], {}),
    "true or false": (0, 1, "yes", None, []),
    "a share": (1, 1.0, -0.1, math.inf, math.nan, "0.1", True, None, []),
    "paths": (3, None, [], [3], ["a", None], {"a": 1}, True),
}


@pytest.mark.parametrize("kind", [Source, PictureSource])
def test_any_value_of_another_type_in_a_data_section_is_one_line(kind):
    kinds = {
        "source": "paths", "subset": "a text or null", "hub_split": "a text", "holdout": "a share",
        "validation": "a share", "field": "a text", "separator": "a text or null",
        "image_field": "a text", "label_field": "a text", "caption_field": "a text",
        "captions": "a text", "resize": "true or false", "flip": "true or false",
        "shift": "a number",
    }  # fmt: skip
    for field in fields(kind):
        for value in WRONG[kinds[field.name]]:
            with pytest.raises(ConfigError) as caught:
                kind.of({"source": "a"} | {field.name: value})
            line = str(caught.value)
            assert line.startswith(f"data.{field.name}={value!r:.60}: expected "), line
            assert "\n" not in line
        with pytest.raises(ConfigError, match=f"did you mean 'data.{field.name}'"):
            kind.of({"source": "a"} | {f"{field.name}x": "a"})
