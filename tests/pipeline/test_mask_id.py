"""A mask id is for models that state none: any other is refused with the model's own."""

from pathlib import Path
from typing import Any

import pytest
from hashed import GOLDEN

import mdiff
from mdiff.backbones.transformer import transformer
from mdiff.cli import run
from mdiff.errors import ConfigError

OWN = {"emoji": 1537, "fashion": 512, "shakespeare": 2048}


def refused(model: str, mask_id: int, own: int) -> None:
    with pytest.raises(ConfigError) as caught:
        mdiff.load(model, mask_id=mask_id, device="cpu")
    line = str(caught.value)
    assert f"mask_id={mask_id}: this model states its own mask id {own}; --mask-id is for" in line
    assert "published text models" in line
    assert line.isprintable()


@pytest.mark.parametrize("name", OWN)
def test_a_builtin_model_states_its_own(name: str) -> None:
    own = OWN[name]
    for wrong in (0, 3, own - 1, own + 1, -1, 10**9, 2**70):
        refused(f"builtin:{name}", wrong, own)
    assert mdiff.load(f"builtin:{name}", mask_id=own, device="cpu").space.mask_id == own


def test_so_does_what_is_saved_and_a_backbone_alone(tmp_path: Path) -> None:
    mdiff.load("builtin:shakespeare", device="cpu").save(tmp_path / "saved")
    refused(str(tmp_path / "saved"), 5, 2048)
    transformer(vocab_size=8, width=8, depth=1, heads=2, max_length=4).save_pretrained(
        tmp_path / "bare"
    )
    refused(str(tmp_path / "bare"), 5, 8)
    assert mdiff.load(tmp_path / "bare", mask_id=8, device="cpu").space.mask_id == 8


@pytest.mark.parametrize("golden", ["amused", "halton_transformer", "maskbit_lfqbert"])
def test_so_do_published_models_of_pictures(golden: str) -> None:
    own = mdiff.load(GOLDEN / golden, device="cpu").space.mask_id
    refused(str(GOLDEN / golden), own - 1, own)


@pytest.mark.parametrize("command", [
    ["generate", "builtin:fashion", "--mask-id", "3"],
    ["generate", "builtin:shakespeare", "--mask-id", "2047", "--length", "16"],
    ["eval", "builtin:emoji", "--mask-id", "4", "--data", "x"],
])  # fmt: skip
def test_the_command_line_says_so_in_one_line(command: list[str], capsys: Any) -> None:
    assert run(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"this model states its own mask id {OWN[command[1].split(':')[1]]};" in line
