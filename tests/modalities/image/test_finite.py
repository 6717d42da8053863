"""Damaged weights: a codec gives what it gave without the damage, or an error; never a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import GOLDEN
from PIL import Image
from test_codecs import CASES, fitted
from torch import Tensor
from toy_pictures import toy_pictures

import mdiff
from mdiff.cli import run
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import read_model_files
from mdiff.modalities.image.codec import load_codec, make_codec, save_codec
from mdiff.pipeline.amused import load_codec as load_amused

DAMAGE = (float("nan"), float("inf"), -float("inf"))
AMUSED = "vq_diffusers"
NAMES = [case.values[0] for case in CASES if json.loads(case.values[0])["name"] != AMUSED]


def codec_of(described: str) -> Any:
    if described == AMUSED:
        return load_amused(read_model_files(GOLDEN / "amused").parts["vqvae"], torch.device("cpu"))
    return fitted(described)


@contextmanager
def damaged(tensor: Tensor, position: int, value: float) -> Iterator[None]:
    flat = tensor.view(-1)
    before = flat[position].clone()
    flat[position] = value
    try:
        yield
    finally:
        flat[position] = before


def outcome(call: Any, given: Tensor) -> Tensor | None:
    """What the call gives; None where it is a CheckpointError in the words of codecs."""
    try:
        found: Tensor = call(given)
        return found
    except CheckpointError as error:
        if "gave values that are not finite" in str(error):
            return None
        raise


def check_damage(described: str, *, positions: int) -> int:
    """Damage each float tensor of a codec at some positions; how many were tried."""
    codec = codec_of(described)
    side = 2 * codec.stride
    images = toy_pictures(2, codec.channels, (side, side))
    ids = codec.encode(images)
    whole = codec.decode(ids)
    tried = 0
    for name, tensor in codec.state().items():
        if not tensor.is_floating_point():
            continue
        chosen = torch.linspace(0, tensor.numel() - 1, positions).long().unique().tolist()
        for number, position in enumerate(chosen):
            with damaged(tensor, position, DAMAGE[(number + tried) % 3]):
                encoded, decoded = outcome(codec.encode, images), outcome(codec.decode, ids)
            assert encoded is None or torch.equal(encoded, ids), (name, position)
            assert decoded is None or torch.equal(decoded, whole), (name, position)
            assert encoded is None or decoded is None, (name, position)
            tried += 1
    return tried


@pytest.mark.parametrize("described", [AMUSED, *NAMES[4:6], NAMES[-1]])
def test_no_tensor_with_a_nan_or_an_infinity_gives_a_picture_or_ids(described: str) -> None:
    check_damage(described, positions=1)


@pytest.mark.slow
@pytest.mark.parametrize("described", [AMUSED, *NAMES])
def test_no_position_of_any_tensor_of_any_codec_does(described: str) -> None:
    tried = check_damage(described, positions=24)
    assert tried >= 100 or json.loads(described)["name"] in ("levels", "kmeans")


@pytest.mark.parametrize("name", ["levels", "kmeans"])
def test_tables_of_whole_numbers_are_not_taken_from_fractions(name: str, tmp_path: Path) -> None:
    codec = make_codec({"name": name, **({"codebook_size": 16} if name == "kmeans" else {})})
    codec.fit(toy_pictures(9, codec.channels))
    state = {key: tensor.float() * float("nan") for key, tensor in codec.state().items()}
    with pytest.raises(CheckpointError, match=r"expected .* uint8"):
        codec.load_state(state)


def test_a_damaged_codec_encodes_nothing_and_exits_with_4(tmp_path: Path, capsys: Any) -> None:
    codec = make_codec({"name": "vq", "channels": 3, "codebook_size": 8, "width": 8})
    for name, tensor in codec.state().items():
        if name.startswith("encoder") and name.endswith("weight"):
            tensor.flatten()[0] = float("nan")
    save_codec(codec, tmp_path / "codec")
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    words = ["encode", str(tmp_path / "codec"), str(tmp_path / "x.png"), "--workers", "1"]
    assert run(["tokenizer", *words, "--out", str(tmp_path / "ids")]) == 4
    assert "not finite" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="weights are damaged"):
        load_codec(tmp_path / "codec").encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["vq", "bits"])
@pytest.mark.parametrize("lr", [1e10, 1e30])
def test_a_fit_that_diverges_stops_and_names_its_rate(name: str, lr: float) -> None:
    said: list[str] = []
    codec = make_codec({"name": name, "channels": 3, "width": 8, "steps": 400, "lr": lr})
    with pytest.raises(ConfigError, match=r"codec.lr=.*: training diverged"):
        codec.fit(toy_pictures(12, 3), report=said.append)
    assert not any("nan" in line for line in said)


def test_a_codec_that_diverges_leaves_no_folder(tmp_path: Path, capsys: Any) -> None:
    for number in range(12):
        Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(tmp_path / f"{number}.png")
    words = ["train", str(tmp_path), "--out", str(tmp_path / "codec"), "--kind", "vq"]
    words += ["--steps", "60", "-o", "lr=1e30", "-o", "width=8", "--codebook-size", "8"]
    assert run(["tokenizer", *words]) == 2
    assert "codec.lr=1e+30" in capsys.readouterr().err
    assert not (tmp_path / "codec").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 0, True, "fast", None])
def test_a_rate_that_is_no_positive_number_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"codec\.lr="):
        make_codec({"name": "vq", "lr": value})


def test_a_generated_picture_is_refused_where_the_codec_is_damaged(tmp_path: Path) -> None:
    model = mdiff.load("builtin:emoji")
    tensor = next(t for n, t in model.modality.codec.state().items() if n.startswith("decoder"))
    with damaged(tensor, 0, float("nan")), pytest.raises(CheckpointError, match="not finite"):
        model.generate(sampler="halton", steps=1)
