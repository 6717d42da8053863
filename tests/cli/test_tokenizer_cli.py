"""`mdiff tokenizer` on pictures: from a folder of files to tokens and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
from folders import ACCELERATE, ROOT
from PIL import Image
from volume_runs import content

from mdiff.cli import run
from mdiff.modalities.image.codec import load_codec
from mdiff.modalities.image.data.token_shards import open_shards

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures of 16 x 16 in two subfolders, which name the labels; a codec of them."""
    home = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    for number in range(10):
        folder = home / "faces" / ("sad" if number % 2 else "glad")
        folder.mkdir(parents=True, exist_ok=True)
        small = random.integers(0, 4, (4, 4, 3), dtype=np.uint8) * 80
        Image.fromarray(small.repeat(4, 0).repeat(4, 1)).save(folder / f"{number}.png")
    words = ["tokenizer", "train", str(home / "faces"), "--out", str(home / "codec")]
    assert run([*words, "--kind", "kmeans", "--codebook-size", "32", "--seed", "3"]) == 0
    return home


@pytest.fixture
def faces(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "faces", tmp_path / "faces"))


@pytest.fixture
def codec(made: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(made / "codec", tmp_path / "codec"))


def last(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("levels", ["--channels", "3"]),
        ("vq", ["--steps", "2", "-o", "width=8", "-o", "batch_size=4", "--stride", "2"]),
        ("bits", ["--steps", "2", "-o", "width=8", "-o", "quantizer=fsq", "-o", "levels=[3,5]"]),
    ],
)
def test_every_kind_is_trained_and_comes_back_from_its_folder(
    faces: Path, kind: str, options: list[str], capsys: Captured
) -> None:
    out = faces.parent / kind
    words = ["tokenizer", "train", str(faces), "--out", str(out), "--kind", kind]
    assert run([*words, "--size", "16x16", "--holdout", "0.2", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(out)
    assert "held out: psnr" in captured.err
    assert load_codec(out).name == kind
    assert run(["tokenizer", "inspect", str(out), "--json"]) == 0
    report = last(capsys)
    assert (report["tokenizer"], report["channels"]) == (kind, 3)
    assert report["stride"] == {"levels": 1, "vq": 2, "bits": 4}[kind]


def test_pictures_become_shards_and_pictures_again(
    faces: Path, codec: str, tmp_path: Path, capsys: Captured
) -> None:
    tokens = tmp_path / "tokens"
    words = ["tokenizer", "encode", codec, str(faces), "--out", str(tokens), "--rows", "4"]
    assert run([*words, "--workers", "1", "--json"]) == 0
    assert last(capsys) == {
        "out": str(tokens), "count": 10, "made": 3, "kept": 0, "problems": []
    }  # fmt: skip
    found = open_shards(tokens, codec=load_codec(codec))
    assert found.label_names == ["glad", "sad"]
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 5 + [1] * 5
    assert found.names[0] == "glad/0.png"
    assert run([*words, "--workers", "1"]) == 0
    assert "0 shards made, 3 kept" in capsys.readouterr().err

    assert run(["tokenizer", "decode", codec, str(tokens), "--out", str(tmp_path / "all")]) == 0
    written = sorted((tmp_path / "all").iterdir())
    assert [path.name for path in written] == [f"{i:03}.png" for i in range(10)]
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in written])
    given = [np.array(Image.open(faces / name)) for name in found.names]
    # 32 centres for about 60 colours: near, not the same.
    error = (images.float() - torch.from_numpy(np.stack(given))).square().mean()
    assert error < 0.5 * float(np.var(np.stack(given)))

    grid = tmp_path / "grid.png"
    words = ["tokenizer", "decode", codec, str(tokens), "--out", str(grid), "--n", "5"]
    assert run(words) == 0
    with Image.open(grid) as picture:
        assert picture.size == (3 * 18 + 2, 2 * 18 + 2)
        assert np.array_equal(np.array(picture)[2:18, 20:36], images[1].numpy())


def test_a_batch_goes_on_past_bad_files_and_reports_them_at_the_end(
    faces: Path, codec: str, tmp_path: Path, capsys: Captured
) -> None:
    whole = (faces / "glad" / "0.png").read_bytes()
    (faces / "glad" / "cut.png").write_bytes(whole[:60])
    (faces / "glad" / "page.png").write_text("<html>")
    (faces / "sad" / "empty.png").write_bytes(b"")
    Image.new("RGB", (20, 16)).save(faces / "sad" / "wide.png")
    tokens = tmp_path / "tokens"
    words = ["tokenizer", "encode", codec, str(faces), "--out", str(tokens), "--workers", "1"]
    assert run(words) == 3
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tokens)
    lines = captured.err.splitlines()
    assert lines[-1].startswith("error: 4 of 14 pictures were left out")
    for name in ("cut.png", "page.png", "empty.png", "wide.png"):
        assert sum(line.startswith("left out: ") and name in line for line in lines) == 1
    assert len(open_shards(tokens)) == 10
    assert len(open_shards(tokens).manifest["problems"]) == 4
    assert run([*words, "--resize", "--size", "16"]) == 3
    assert len(open_shards(tokens)) == 11


def test_a_process_with_a_share_makes_it_and_the_last_one_reports(
    faces: Path, codec: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (faces / "glad" / "page.png").write_text("<html>")
    tokens = tmp_path / "tokens"
    words = ["tokenizer", "encode", codec, str(faces), "--out", str(tokens), "--rows", "4"]
    words += ["--workers", "1"]
    assert run([*words, "--shard", "2/2"]) == 0
    made = "shard-000001.safetensors: 1 of 1"
    assert capsys.readouterr() == (
        "", f"{made}\nother shards of {tokens} are not complete yet: their processes go on\n"
    )  # fmt: skip
    # A launcher says the same by its environment.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(words) == 3
    assert "10 pictures: 2 shards made, 1 kept" in capsys.readouterr().err
    assert run([*words, "--shard", "3/2"]) == 2
    assert "--shard 3/2: expected K/N" in capsys.readouterr().err


def test_an_invalid_timeout_is_one_line(
    faces: Path, codec: str, tmp_path: Path, capsys: Captured
) -> None:
    words = ["tokenizer", "encode", codec, str(faces), "--out", str(tmp_path / "tokens")]
    assert run([*words, "--timeout", "0"]) == 2
    assert capsys.readouterr().err == "error: timeout=0: expected more than 0 seconds\n"
    assert not (tmp_path / "tokens").exists()


@pytest.mark.slow
def test_encoding_under_accelerate_launch_gives_the_same_bytes(
    faces: Path, codec: str, tmp_path: Path
) -> None:
    words = ["tokenizer", "encode", codec, str(faces), "--rows", "2", "--out"]
    assert run([*words, str(tmp_path / "one"), "--workers", "1"]) == 0
    launcher = processes.launcher(ACCELERATE / "cpu.yaml", "-m")
    done = processes.run([*launcher, "mdiff", *words, tmp_path / "two"], cwd=ROOT, check=True)
    # Each process that finds all shards complete says so.
    assert set(done.stdout.split()) == {str(tmp_path / "two")}
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_inspect_says_what_is_kept_of_pictures(faces: Path, codec: str, capsys: Captured) -> None:
    assert run(["tokenizer", "inspect", codec, "--data", str(faces), "--json"]) == 0
    report = last(capsys)
    assert report["bits_per_pixel"] == pytest.approx(5 / 16)
    assert report["usage"] > 0.9
    assert report["psnr"] > 5
    assert 0 <= report["ssim"] <= 1
    assert report["pictures"] == 10
    assert run(["tokenizer", "inspect", codec]) == 0
    assert "fingerprint" in capsys.readouterr().out


def test_levels_are_measured_as_lossless(capsys: Captured, tmp_path: Path) -> None:
    out = str(tmp_path / "levels")
    words = ["tokenizer", "train", "sklearn.digits", "--out", out, "--kind", "levels"]
    assert run(words) == 0
    assert "17 values, 0, 15, 30" in capsys.readouterr().err
    words = ["tokenizer", "encode", out, "sklearn.digits", "--out", str(tmp_path / "t")]
    assert run([*words, "--json"]) == 0
    assert last(capsys)["count"] == 1797


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "FACES", "--out", "NEW", "--kind", "kmean"], 2, "did you mean 'kmeans'"),
        (["train", "FACES", "--out", "CODEC", "--kind", "kmeans"], 2, "exists already"),
        (["train", "FACES", "--out", "NEW", "--kind", "kmeans", "--eos"], 2, "--eos is for"),
        (["train", "FACES", "--out", "NEW", "--kind", "vq", "-o", "stepz=3"], 2, "'steps'"),
        (["train", "a.txt", "--out", "NEW", "--size", "8"], 2, "--size is for --kind bits"),
        (["train", "FACES", "--out", "NEW", "--kind", "kmeans", "--size", "a"], 2, "32x32"),
        (["train", "FACES", "--out", "NEW", "--kind", "levels", "--steps", "9"], 2, "steps"),
        (["train", "/no/where", "--out", "NEW", "--kind", "kmeans"], 3, "no such file"),
        (["train", "FACES", "--out", "NEW", "--kind", "kmeans", "--codebook-size", "900"], 3,
         "different patches"),
        (["encode", "kmeans", "x"], 2, "trained first"),
        (["encode", "CODEC", "FACES"], 2, "--out DIR"),
        (["encode", "CODEC", "FACES", "--out", "FACES"], 2, "name a new folder"),
        (["encode", "CODEC", "FACES", "--out", "NEW", "--rows", "0"], 2, "at least 1"),
        (["encode", "byte", "two", "words"], 2, "quotes"),
        (["encode", "byte", "x", "--size", "8"], 2, "--size is for pictures"),
        (["decode", "CODEC", "FACES", "--out", "NEW"], 3, "encode again"),
        (["decode", "CODEC", "TOKENS", "--out", "NEW", "--n", "0"], 2, "at least 1"),
        (["decode", "CODEC", "TOKENS", "--out", "x.jpg"], 2, "ends in .png"),
        (["decode", "CODEC", "TOKENS", "--out", "FACES"], 2, "exists already"),
        (["decode", "CODEC", "TOKENS"], 2, "--out"),
        (["decode", "OTHER", "TOKENS", "--out", "NEW"], 3, "another codec"),
        (["inspect", "BROKEN"], 4, "truncated"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_its_exit_code(
    faces: Path, codec: str, tmp_path: Path, words: list[str], code: int, said: str,
    capsys: Captured,
) -> None:  # fmt: skip
    paths = {"FACES": str(faces), "CODEC": codec, "NEW": str(tmp_path / "new")}
    for name in ("TOKENS", "OTHER", "BROKEN"):
        paths[name] = str(tmp_path / name.lower())
    if "TOKENS" in words:
        assert run(["tokenizer", "encode", codec, str(faces), "--out", paths["TOKENS"]]) == 0
    if "OTHER" in words:
        train = ["tokenizer", "train", str(faces), "--out", paths["OTHER"], "--kind", "levels"]
        assert run([*train, "--channels", "3"]) == 0
    if "BROKEN" in words:
        broken = Path(paths["BROKEN"])
        broken.mkdir()
        for path in Path(codec).glob("codec.*"):
            (broken / path.name).write_bytes(
                path.read_bytes()[: 90 if "safe" in path.name else 999]
            )
    capsys.readouterr()
    assert run(["tokenizer", *(paths.get(word, word) for word in words)]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert not Path(paths["NEW"]).exists() or code != 2 or "--rows" in words


def test_an_altered_codec_is_refused_by_its_manifest(codec: str, capsys: Captured) -> None:
    settings = Path(codec) / "codec.json"
    settings.write_text(settings.read_text().replace("32", "31"))
    assert run(["tokenizer", "inspect", codec]) == 4
    assert "altered" in capsys.readouterr().err
