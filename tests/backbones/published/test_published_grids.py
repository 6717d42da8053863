"""Generators of other projects over a grid: Halton-MaskGIT's and MaskBit's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hashed import GOLDEN, golden_weights
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import mdiff
from mdiff.cli import run
from mdiff.errors import CheckpointError, ConfigError
from mdiff.tokens import hidden_canvas

FAMILIES = {"halton_transformer": "HaltonTransformer", "maskbit_lfqbert": "MaskBitGenerator"}
# Absolute, stated beside the goldens.
TOLERANCE = 1e-4
over_every_family = pytest.mark.parametrize("golden", FAMILIES)


def truth_of(golden: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / golden / "golden.safetensors")


def labels_of(truth: dict[str, Tensor], model: Any) -> Tensor:
    return torch.where(truth["drop_label"].bool(), model.classes, truth["class_labels"])


def changed(golden: str, folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    shutil.copy(GOLDEN / golden / "config.json", folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


@over_every_family
def test_logits_are_those_of_the_official_code(golden: str) -> None:
    pipeline = mdiff.load(GOLDEN / golden, device="cpu")
    model: Any = pipeline.denoiser
    assert type(model).__name__ == FAMILIES[golden]
    truth = truth_of(golden)
    tokens, expected = truth["tokens"].flatten(1), truth["logits"].flatten(1, -2)
    cond = {"label": labels_of(truth, model)}
    with torch.no_grad():
        logits = model(tokens, cond=cond)
        assert float((logits - expected).abs().max()) <= TOLERANCE
        at = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
        assert torch.allclose(model(tokens, at=at, cond=cond), logits[at], atol=1e-6)
        # No condition is the class that says none.
        none = {"label": torch.full((len(tokens),), model.classes)}
        assert torch.equal(model(tokens), model(tokens, cond=none))
        assert not torch.allclose(model(tokens), logits, atol=5e-4)


@over_every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(golden: str, side: str) -> None:
    model: Any = mdiff.load(GOLDEN / golden, device="cpu").denoiser
    tokens = truth_of(golden)["tokens"].flatten(1)[:2]
    pad = 3 * model.codes_per_position
    cond = {"label": torch.tensor([1, 4])}
    alone = tokens[:1, :-pad]
    filler = torch.zeros(1, pad, dtype=torch.int64)
    short = torch.cat([filler, alone] if side == "left" else [alone, filler], 1)
    valid = torch.ones(2, tokens.shape[1], dtype=torch.bool)
    own = slice(pad, None) if side == "left" else slice(None, -pad)
    valid[0] = False
    valid[0, own] = True
    with torch.no_grad():
        both = model(torch.cat([short, tokens[1:]]), valid=valid, cond=cond)
        single = model(alone, cond={"label": cond["label"][:1]})
        assert torch.allclose(both[0, own], single[0], atol=1e-5)
        assert torch.allclose(both[1:], model(tokens[1:], cond={"label": cond["label"][1:]}),
                              atol=1e-5)  # fmt: skip


@over_every_family
def test_what_is_loaded_is_saved_bit_for_bit(golden: str, tmp_path: Path) -> None:
    model: Any = mdiff.load(GOLDEN / golden, device="cpu").denoiser
    model.save_pretrained(tmp_path / "again")
    before = load_file(GOLDEN / golden / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((at / "config.json").read_text()) for at in
            (GOLDEN / golden, tmp_path / "again")]  # fmt: skip
    assert configs[0] == configs[1]


def test_a_tied_head_may_be_left_out_of_the_files(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "halton_transformer" / "model.safetensors")
    less = {name: x for name, x in tensors.items() if name != "head.weight"}
    model: Any = mdiff.load(changed("halton_transformer", tmp_path / "it", less)).denoiser
    assert model.head.weight is model.tok_emb.weight


@over_every_family
def test_a_wrong_set_of_tensors_is_refused_by_name(golden: str, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / golden / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.startswith("transformer"))
    fewer = {key: x for key, x in tensors.items() if key != name}
    for said, bad in (
        (f"missing: {name}", fewer),
        ("unexpected: odd", tensors | {"odd": torch.zeros(1)}),
        (f"of another shape: {name}", tensors | {name: torch.zeros(2, 2)}),
    ):
        folder = changed(golden, tmp_path / said.split(":")[0], bad)
        with pytest.raises(CheckpointError, match=said):
            mdiff.load(folder)


@pytest.mark.parametrize(
    ("golden", "change", "said"),
    [
        ("halton_transformer", {"proj": 2}, "proj"),
        ("halton_transformer", {"tome_keep_ratio": 0.5}, "tome_keep_ratio"),
        ("halton_transformer", {"depth": 10**9}, "depth"),
        ("halton_transformer", {"heads": 64}, "heads"),
        ("maskbit_lfqbert", {"codebook_size": 63}, "codebook_size"),
        ("maskbit_lfqbert", {"codebook_splits": 4}, "codebook_splits"),
        ("maskbit_lfqbert", {"heads": 5}, "heads"),
        ("maskbit_lfqbert", {"use_prenorm": "no"}, "use_prenorm"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_its_entry(
    golden: str, change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = changed(golden, tmp_path / "it", {"x": torch.zeros(1)})
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        mdiff.load(folder)


def test_heads_that_do_not_divide_the_width_leave_its_rest_out() -> None:
    from mdiff.pipeline.published import built

    config = json.loads((GOLDEN / "halton_transformer" / "config.json").read_text())
    module = built("halton_transformer", config | {"hidden_dim": 512, "heads": 6})
    shapes = {name: tuple(x.shape) for name, x in module.state_dict().items()}
    assert shapes["transformer.layers.0.attn.wq.weight"] == (510, 512)
    assert shapes["transformer.layers.0.attn.wo.weight"] == (512, 510)


@over_every_family
def test_what_a_grid_cannot_be_given_is_refused(golden: str) -> None:
    model: Any = mdiff.load(GOLDEN / golden, device="cpu").denoiser
    tokens = truth_of(golden)["tokens"].flatten(1)
    for odd, said in (
        ({"cond": {"style": torch.zeros(3)}}, "'style'"),
        ({"cond": {"label": torch.zeros(3)}}, r"expected \(3,\) int64"),
        ({"documents": torch.zeros_like(tokens)}, "documents"),
    ):
        with pytest.raises(ConfigError, match=said):
            model(tokens, **odd)
    with pytest.raises(ConfigError, match="grid has"):
        model(torch.cat([tokens, tokens], 1))


@over_every_family
@pytest.mark.parametrize("sampler", ["halton", "confidence", "first_hitting"])
def test_the_mask_is_never_generated_though_the_head_may_have_it(golden: str, sampler: str) -> None:
    pipeline = mdiff.load(GOLDEN / golden, device="cpu")
    model: Any = pipeline.denoiser
    if golden == "halton_transformer":
        # Every position would rather write the mask.
        model.head.bias = torch.nn.Parameter(model.head.bias.detach().clone())
        model.head.bias.data[model.mask_id] = 100.0
    canvas = hidden_canvas(3, model.window, space=pipeline.space)
    cond = {"label": torch.tensor([0, 3, model.classes])}
    made = mdiff.sample(model, canvas, space=pipeline.space, sampler=sampler, cond=cond, seed=1)
    assert int(made.tokens.max()) < model.mask_id
    assert pipeline.modality.name == "ids"


def with_codec(golden: str, tokenizer: str, folder: Path, **changes: Any) -> Path:
    """The generator's folder with a codec of the same ids beside it."""
    config = json.loads((GOLDEN / golden / "config.json").read_text())
    tensors = load_file(GOLDEN / golden / "model.safetensors")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    (folder / "codec").mkdir()
    own = json.loads((GOLDEN / tokenizer / "config.json").read_text())
    weights = golden_weights(tokenizer)
    if changes:
        own["params"] |= changes
        weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"][:48]
    (folder / "codec" / "config.json").write_text(json.dumps(own))
    save_file(weights, folder / "codec" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("golden", "tokenizer", "changes"),
    [
        ("halton_transformer", "vqgan_taming", {"n_embed": 48}),
        ("maskbit_lfqbert", "maskbit_tokenizer", {}),
    ],
)
def test_with_a_codec_beside_it_a_folder_makes_pictures_of_a_class(
    golden: str, tokenizer: str, changes: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    folder = with_codec(golden, tokenizer, tmp_path / "model", **changes)
    out = tmp_path / "made"
    line = ["generate", str(folder), "--label", "7", "--sampler", "halton", "--json"]
    assert run([*line, "--guidance-scale", "500", "--out", f"{out}/"]) == 0
    (made_file,) = out.glob("*.png")
    assert Image.open(made_file).size == (16, 16)
    first = json.loads(capsys.readouterr().out)["tokens"]
    assert run([*line, "--out", f"{tmp_path / 'other'}/"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] != first
    pipeline = mdiff.load(folder, device="cpu")
    assert pipeline.modality.labels == [str(number) for number in range(10)]
    pipeline.save(tmp_path / "saved")
    again = mdiff.load(tmp_path / "saved", device="cpu")
    made = [
        each.generate({"label": 3}, sampler="halton", seed=5)[0].tokens
        for each in (pipeline, again)
    ]
    assert made[0] == made[1]
    assert run(["inspect", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["not_used"] == []
    assert any(tensor["name"].startswith("codec.encoder") for tensor in report["tensors"])
    assert run(["tokenizer", "inspect", str(folder / "codec"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stride"] == 4
    assert run(["inspect", str(folder / "codec"), "--json"]) == 0


def test_a_codec_of_other_ids_is_refused(tmp_path: Path, capsys: Any) -> None:
    folder = with_codec("halton_transformer", "maskbit_tokenizer", tmp_path / "model")
    assert run(["generate", str(folder), "--label", "7", "--out", str(tmp_path / "x.png")]) == 4
    assert "1 x 64 ids a position, the model 1 x 48" in capsys.readouterr().err
