"""Writing tokenised pictures: in parallel, by atomic writes, and only what is missing.

The header of a shard names the pictures and the codec that made it: a second run over the same
pictures finds it and leaves it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import check_tensors, locked, read_tensors, replace_file, sweep
from mdiff.modalities.image import CODES_KEY, Codec, make_codec, save_codec
from mdiff.modalities.image.data import (
    FORMAT,
    MANIFEST,
    TEXTS,
    Pictures,
    file_digest,
    fingerprint,
    packed,
)
from mdiff.pipeline.batch.division import Division
from mdiff.pipeline.batch.runner import Report, make_all

SHARD = "shard-{:06d}.safetensors"
SHARD_NAME = re.compile(r"shard-\d{6,}\.safetensors")
# The digests of codec, pictures and content. One entry alone: the order of several in a header is
# not defined by the library.
ORIGIN = "origin"
# Pictures a shard: a few MB of ids at most.
ROWS = 4096
LARGEST_INT16 = 2**15 - 1
# Characters of a digest that tell codecs apart in a message.
SHOWN = 12


@dataclass(frozen=True)
class Written:
    """The result of `write_shards`: pictures in all, shards made and shards that were there."""

    count: int
    made: int
    kept: int


@dataclass(frozen=True, eq=False)
class PictureShard:
    """The pictures `first` to `stop` of all of them, and the file of their tokens.

    It is one item: its pixels (N, C, H, W) uint8, which become ids.
    """

    number: int
    pictures: Pictures
    first: int
    stop: int
    path: Path
    origin: str
    count: int = 1

    def __str__(self) -> str:
        return self.path.name

    def is_complete(self) -> bool:
        """Whether its file is there, from these pictures and this codec."""
        return _header(self.path)[0] == self.origin

    def clear(self) -> None:
        """Remove what killed writers have left, and the file where its content was altered."""
        sweep(self.path.parent, f"{self.path.name}.")
        if self.is_complete() and not _is_unaltered(self.path):
            self.path.unlink()

    def cut(self) -> Pictures:
        """Its pictures."""
        return self.pictures.at(torch.arange(self.first, self.stop))

    def item(self, number: int) -> np.ndarray:
        """The pixels, sliced on demand: only those of active workers are held twice."""
        return self.cut().pixels.numpy()

    def split(self, item: np.ndarray) -> Sequence[np.ndarray]:
        """Nothing smaller: pictures of one size cost the same, no single one causes a crash."""
        return ()

    def failure(self, item: np.ndarray, how: str) -> None:
        """None: the shard is given up."""

    def write(self, results: Sequence[np.ndarray]) -> None:
        """Write the ids with labels and texts."""
        cut = self.cut()
        tensors = {"ids": torch.tensor(results[0])}
        if cut.labels is not None:
            tensors["labels"] = cut.labels.to(torch.int64)
        for name in TEXTS:
            if (texts := vars(cut)[name]) is not None:
                tensors[name], tensors[f"{name}.ends"] = packed(texts)
        origin = f"{self.origin}:{_content_digest(tensors)}"
        replace_file(self.path, [save(tensors, metadata={ORIGIN: origin})])


@dataclass(frozen=True)
class Encoder:
    """Makes the codec in a worker, from its options and the content of its files."""

    described: dict[str, object]
    files: dict[str, bytes] = field(repr=False)
    gpus: int = 0

    @classmethod
    def of(cls, codec: Codec) -> Encoder:
        """What another process needs to make this codec."""
        with tempfile.TemporaryDirectory() as folder:
            save_codec(codec, folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return cls(codec.config(), files)

    def open(self, worker: int) -> Callable[[np.ndarray], np.ndarray]:
        """Make the codec."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                Path(folder, name).write_bytes(content)
            return partial(encoded, make_codec(self.described, folder=folder))


def encoded(codec: Codec, pixels: np.ndarray) -> np.ndarray:
    """The ids of pixels, in the smaller of two types that holds the codebook."""
    ids = codec.encode(torch.tensor(pixels))
    small = codec.codebook_size - 1 <= LARGEST_INT16
    return ids.to(torch.int16 if small else torch.int32).contiguous().numpy()


def write_shards(
    pictures: Pictures, out: Path, *, codec: Codec, rows: int = ROWS,
    division: Division | None = None, report: Report | None = None,
) -> Written | None:  # fmt: skip
    """Encode the pictures whose shards are not yet in the folder `out`.

    `rows` pictures a shard; `division` by default one process a core, of one thread each. None
    where other processes have still to make their share. Raises ConfigError where `out` holds
    tokens of another codec or other files, CheckpointError while another process makes the same
    share, DataError where the codec refuses the pictures.
    """
    if rows < 1:
        raise ConfigError(f"rows={rows}: need at least 1")
    made_by = fingerprint(codec)
    shards = _shards(pictures, out, made_by, rows)
    division = division or Division()
    if division.engine == "local" and division.workers is None:
        division = replace(division, workers=min(os.cpu_count() or 1, len(shards)))
    report = report or (lambda line: None)
    with locked(out, division.share.lock):
        _begin(shards, out, made_by, division, report)
        maker = Encoder({}, {}) if division.in_process else Encoder.of(codec)
        made = make_all(shards, partial(encoded, codec), maker, division, report=report)
        if not all(shard.is_complete() for shard in shards):
            report(f"other shards of {out} are not complete yet: their processes go on")
            return None
        replace_file(out / MANIFEST, [_manifest(codec, made_by, pictures, shards)])
    return Written(len(pictures), made, len(shards) - made)


def _shards(pictures: Pictures, out: Path, made_by: str, rows: int) -> list[PictureShard]:
    """All shards of the pictures, each with the digests of codec and pictures as its origin."""
    found = []
    for number, first in enumerate(range(0, len(pictures), rows)):
        stop = min(first + rows, len(pictures))
        origin = f"{made_by}:{_digest_of(pictures.at(torch.arange(first, stop)))}"
        path = out / SHARD.format(number)
        found.append(PictureShard(number, pictures, first, stop, path, origin))
    return found


def _begin(
    shards: Sequence[PictureShard], out: Path, made_by: str, division: Division, report: Report
) -> None:
    """Check that the folder may take these shards; remove the manifest of an incomplete one.

    Shards of other pictures, which is reported, are written over, or removed where there are more.
    """
    known = _known(out, made_by)
    wanted = {shard.path.name: shard.origin for shard in shards}
    # Another process may have completed its share since this one has looked.
    checked = division.share.part(shards)
    surplus = known.keys() - wanted.keys()
    if surplus or any(known.get(shard.path.name) != shard.origin for shard in checked):
        (out / MANIFEST).unlink(missing_ok=True)
    if division.share.count == 1:
        sweep(out, MANIFEST)
    for name in surplus:
        sweep(out, name)
        (out / name).unlink(missing_ok=True)
    other = sum(bool(origin) and wanted.get(name) != origin for name, origin in known.items())
    if other:
        report(f"{other} shards of other pictures in {out} are replaced")


def _known(out: Path, made_by: str) -> dict[str, str]:
    """The origins of the shards in a folder, by name; "" of a damaged one.

    Raises ConfigError for another codec's tokens and for a folder of other things.
    """
    # Listed once: another process may add to it. A hidden file is a lock or a desktop's own.
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    found = {name for name in there if SHARD_NAME.fullmatch(name)}
    known = {}
    for name in sorted(found):
        try:
            known[name] = _header(out / name)[0]
        except LookupError:
            # A file of tensors without an origin is not one of ours.
            found.discard(name)
    if there - found - {MANIFEST} or (there and not found):
        raise ConfigError(f"{out} holds {min(there - found)}: name a new folder")
    others = {origin.partition(":")[0] for origin in known.values() if origin} - {made_by}
    if others:
        raise ConfigError(
            f"{out} holds tokens of another codec, {min(others)[:SHOWN]}, not of "
            f"{made_by[:SHOWN]}: name a new folder"
        )
    return known


def _header(path: Path) -> tuple[str, str]:
    """The origin in a shard's header, and its content's digest; "" where the file is not complete.

    Raises LookupError for a complete file of tensors that is no shard.
    """
    try:
        check_tensors(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = (json.loads(file.read(length)).get("__metadata__") or {})[ORIGIN]
    except (CheckpointError, OSError):
        return "", ""
    origin, _, content = str(entry).rpartition(":")
    return origin, content


def _is_unaltered(path: Path) -> bool:
    """Whether a shard's tensors have the digest that its header names."""
    try:
        return _content_digest(read_tensors(path)) == _header(path)[1]
    except CheckpointError:
        return False


def _content_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors by their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}:{tensors[name].dtype}:{tuple(tensors[name].shape)}:".encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()


def _digest_of(part: Pictures) -> str:
    """SHA-256 of the input of a shard."""
    total = hashlib.sha256(str(tuple(part.pixels.shape)).encode())
    total.update(part.pixels.contiguous().numpy().tobytes())
    labels = None if part.labels is None else part.labels.tolist()
    rest = [part.names, labels, part.captions, part.groups]
    total.update(json.dumps(rest).encode())
    return total.hexdigest()


def _manifest(
    codec: Codec, made_by: str, pictures: Pictures, shards: Sequence[PictureShard]
) -> bytes:
    listed = [
        {"name": shard.path.name, "rows": shard.stop - shard.first, **file_digest(shard.path)}
        for shard in shards
    ]
    content = {
        "format": FORMAT,
        "codec": {"fingerprint": made_by, "config": codec.config()},
        "codebook_size": codec.codebook_size,
        CODES_KEY: codec.codes_per_position,
        "size": list(pictures.pixels.shape[2:]),
        "count": len(pictures),
        "label_names": pictures.label_names,
        "problems": pictures.problems,
        "shards": listed,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
