"""Tokenised pictures on disk: written atomically, resumable, and only with their own codec."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from volume_runs import content, encode, started, tiny_pictures

from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files.atomic import locked
from mdiff.files.untrusted import read_json, read_tensors
from mdiff.modalities.image.codec import save_codec
from mdiff.modalities.image.codecs.bits import bits
from mdiff.modalities.image.codecs.kmeans import KMeans, kmeans
from mdiff.modalities.image.codecs.levels import levels
from mdiff.modalities.image.data.images import Pictures
from mdiff.modalities.image.data.token_shards import (
    MANIFEST,
    fingerprint,
    holds_shards,
    open_shards,
    packed,
    unpacked,
)
from mdiff.pipeline.batch.division import Division, Share
from mdiff.pipeline.batch.encoding import write_shards

ALONE = Division(workers=1)


def pictures(count: int = 23) -> Pictures:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    return Pictures(
        pixels=pixels,
        names=[f"no. {i}" for i in range(count)],
        labels=torch.arange(count) % 3,
        label_names=["one", "zwei", "três"],
        captions=["", *[f"pîcture {i}" for i in range(1, count)]],
        groups=[str(i // 2) for i in range(count)],
    )


@pytest.fixture(scope="module")
def codec() -> KMeans:
    return kmeans(codebook_size=16).fit(pictures().pixels)


@pytest.fixture
def folder(tmp_path: Path, codec: KMeans) -> Path:
    out = tmp_path / "tokens"
    write_shards(pictures(), out, codec=codec, rows=10, division=ALONE)
    return out


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def test_what_is_written_is_read_with_everything_that_is_known(folder: Path, codec: KMeans) -> None:
    found, given_ = open_shards(folder, codec=codec), pictures()
    assert holds_shards(folder)
    assert torch.equal(found.ids.long(), codec.encode(given_.pixels))
    assert found.ids.dtype == torch.int16
    assert found.labels is not None
    assert given_.labels is not None
    assert torch.equal(found.labels, given_.labels)
    for name in ("names", "label_names", "captions", "groups"):
        assert getattr(found, name) == getattr(given_, name)
    assert (len(found), found.size) == (23, (8, 8))
    assert [shard["rows"] for shard in found.manifest["shards"]] == [10, 10, 3]
    assert found.manifest["codec"] == {"fingerprint": fingerprint(codec), "config": codec.config()}


def test_pictures_without_labels_and_several_codes_a_position_come_back_too(tmp_path: Path) -> None:
    codec = bits(bits=34 - 2, codes_per_position=2, width=4, blocks=1)
    plain = Pictures(pixels=pictures().pixels, names=pictures().names)
    write_shards(plain, tmp_path / "out", codec=codec)
    found = open_shards(tmp_path / "out", codec=codec)
    assert (found.labels, found.captions, found.groups) == (None, None, None)
    assert found.ids.dtype == torch.int32
    assert found.ids.shape == (23, 2, 2, 2)
    assert torch.equal(found.ids.long(), codec.encode(plain.pixels))


def test_a_second_run_makes_only_what_is_missing(folder: Path, codec: KMeans) -> None:
    before = stamps(folder)
    again = write_shards(pictures(), folder, codec=codec, rows=10, division=ALONE)
    assert (again.made, again.kept) == (0, 3)
    assert stamps(folder) == before
    lost, cut, kept = sorted(folder.glob("shard-*"))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-5])
    (folder / MANIFEST).unlink()
    (folder / ".shard-000000.safetensors.x.tmp").write_bytes(b"half")
    with pytest.raises(DataError, match="encode again"):
        open_shards(folder)
    again = write_shards(pictures(), folder, codec=codec, rows=10, division=ALONE)
    assert (again.made, again.kept) == (2, 1)
    assert stamps(folder)[kept.name] == before[kept.name]
    assert not list(folder.glob(".*.tmp"))
    assert torch.equal(open_shards(folder).ids.long(), codec.encode(pictures().pixels))


def test_changed_pictures_are_encoded_again_and_fewer_leave_no_shard(
    folder: Path, codec: KMeans
) -> None:
    changed = pictures()
    changed.pixels[12] = 255 - changed.pixels[12]
    assert write_shards(changed, folder, codec=codec, rows=10, division=ALONE).made == 1
    assert torch.equal(open_shards(folder).ids.long(), codec.encode(changed.pixels))
    few = changed.at(torch.arange(10))
    assert write_shards(few, folder, codec=codec, rows=10, division=ALONE).made == 0
    assert len(list(folder.glob("shard-*"))) == 1
    assert len(open_shards(folder)) == 10


def test_several_processes_write_the_same_bytes_as_one(folder: Path, codec: KMeans) -> None:
    parallel = folder.parent / "parallel"
    done = write_shards(pictures(), parallel, codec=codec, rows=10, division=Division(workers=2))
    assert done.made == 3
    for path in sorted(folder.iterdir()):
        assert (parallel / path.name).read_bytes() == path.read_bytes(), path.name


def test_shares_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    save_codec(kmeans(codebook_size=8).fit(tiny_pictures(20).pixels), tmp_path / "codec")
    encode(tmp_path / "codec", 20, tmp_path / "one", workers=1)
    encode(tmp_path / "codec", 30, tmp_path / "three", workers=1)
    # Fewer pictures than before: what is too much is taken away.
    jobs = [
        started(encode, tmp_path / "codec", 20, tmp_path / "three", share=Share(number, 3))
        for number in (3, 1, 2)
    ]
    for process in jobs:
        process.join(60)
    assert [process.exitcode for process in jobs] == [0, 0, 0]
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_a_share_that_comes_late_leaves_the_manifest_where_it_is(tmp_path: Path) -> None:
    save_codec(kmeans(codebook_size=8).fit(tiny_pictures(20).pixels), tmp_path / "codec")
    out = tmp_path / "out"

    def share(number: int) -> Any:
        return encode(tmp_path / "codec", 20, out, share=Share(number, 2), workers=1)

    assert share(2) is None
    first = share(1)
    assert (first.made, first.kept) == (5, 5)
    before = content(out)
    late = share(2)
    assert (late.made, late.kept) == (0, 10)
    assert content(out) == before
    # What another share has to make is not its business; before it makes its own shard it takes
    # the manifest away.
    (out / "shard-000002.safetensors").unlink()
    assert share(2) is None
    assert (out / MANIFEST).exists()
    (out / "shard-000003.safetensors").unlink()
    assert share(2) is None
    assert not (out / MANIFEST).exists()
    encode(tmp_path / "codec", 20, out, workers=1)
    assert content(out) == before


def test_an_interrupt_says_what_is_complete_and_the_next_run_goes_on(
    folder: Path, codec: KMeans
) -> None:
    out = folder.parent / "interrupted"

    def report(line: str) -> None:
        if line == "shard-000001.safetensors: 2 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 of 3 shards are complete; the same command"):
        write_shards(pictures(), out, codec=codec, rows=10, division=ALONE, report=report)
    assert not (out / MANIFEST).exists()
    assert write_shards(pictures(), out, codec=codec, rows=10, division=ALONE).made == 1
    assert content(out) == content(folder)


def test_a_second_process_on_the_folder_is_refused_by_the_lock(folder: Path, codec: KMeans) -> None:
    with locked(folder), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        write_shards(pictures(), folder, codec=codec)


def test_another_codec_is_refused_for_writing_and_for_reading(folder: Path, codec: KMeans) -> None:
    other = kmeans(codebook_size=16).fit(pictures().pixels, seed=1)
    assert fingerprint(other) != fingerprint(codec)
    both = f"{fingerprint(codec)[:12]}, not of {fingerprint(other)[:12]}"
    with pytest.raises(ConfigError, match=f"another codec, {both}"):
        write_shards(pictures(), folder, codec=other)
    with pytest.raises(DataError, match="another codec"):
        open_shards(folder, codec=other)
    assert torch.equal(open_shards(folder).ids, open_shards(folder, codec=codec).ids)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path, codec: KMeans) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        write_shards(pictures(), tmp_path, codec=codec)
    (tmp_path / "thesis.txt").rename(tmp_path / MANIFEST)
    with pytest.raises(ConfigError, match="name a new folder"):
        write_shards(pictures(), tmp_path, codec=codec)
    assert (tmp_path / MANIFEST).read_text() == "years of work"
    assert not holds_shards(tmp_path)


def test_pictures_that_the_codec_refuses_leave_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pixel value"):
        write_shards(pictures(), tmp_path / "out", codec=levels(channels=3, levels=2))
    assert not (tmp_path / "out" / MANIFEST).exists()


def altered(folder: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | change))


def test_damage_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    shards = read_json(folder / MANIFEST)["shards"]

    def refused(change: dict[str, Any], said: str) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        altered(copy, change)
        with pytest.raises(DataError, match=said) as caught:
            open_shards(copy)
        assert "\n" not in str(caught.value)
        shutil.rmtree(copy)

    refused({"count": 24}, "24 pictures")
    refused({"format": 2}, "not a manifest")
    refused({"shards": []}, "not a manifest")
    refused({"shards": [{"name": "x"}]}, "not a manifest")
    refused({"codec": {}}, "not a manifest")
    refused({"label_names": ["one"]}, "label 2")
    refused({"codebook_size": 4}, "ids 0 to 3")
    refused({"splits": 2}, "expected")
    refused({"shards": [shards[0] | {"name": "../tokens/shard-000000.safetensors"}]}, "plain name")
    refused({"shards": [shards[0] | {"name": "shard-7"}]}, "is missing")
    refused({"shards": [shards[0] | {"rows": 9}]}, "shard of 9")
    path = folder / shards[1]["name"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated or altered"):
        open_shards(folder)


def test_a_shard_of_other_columns_is_refused(folder: Path) -> None:
    from mdiff.modalities.image.data.token_shards import file_digest

    entry = read_json(folder / MANIFEST)["shards"][0]
    path = folder / entry["name"]
    whole = read_tensors(path)

    def refused(tensors: dict[str, torch.Tensor], said: str) -> None:
        save_file(tensors, path)
        altered(folder, {"count": 10, "shards": [entry | file_digest(path)]})
        with pytest.raises(DataError, match=said):
            open_shards(folder)

    refused({"labels": whole["labels"]}, "not a shard")
    refused(whole | {"ids": whole["ids"].float()}, "not a shard")
    refused(whole | {"names.ends": whole["names.ends"].flip(0)}, "not a shard")
    refused({key: value for key, value in whole.items() if key != "names.ends"}, "not a shard")
    refused(whole | {"ids": whole["ids"] - 1}, "id -1")


@given(st.lists(st.text(), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_strings_come_back_from_bytes_and_ends(texts: list[str]) -> None:
    joined, ends = packed(texts)
    assert unpacked(joined, ends) == texts
