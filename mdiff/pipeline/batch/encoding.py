"""Writing tokenised pictures: in parallel, by atomic writes, and only what is missing.

The header of a shard names the pictures and the codec that made it: a second run over the same
pictures finds it and leaves it. `volume` divides the work among processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import check_tensors, read_tensors, replace_file, sweep
from mdiff.modalities.image import CODES_KEY, Codec, Report, make_codec, save_codec
from mdiff.modalities.image.data import (
    FORMAT,
    MANIFEST,
    TEXTS,
    Pictures,
    file_digest,
    fingerprint,
    packed,
)
from mdiff.pipeline.batch.jobs import Heartbeat, Job, Make
from mdiff.pipeline.batch.volume import Launched, check_pool, make_all

SHARD = "shard-{:06d}.safetensors"
SHARD_NAME = re.compile(r"shard-\d{6,}\.safetensors")
# The digests of codec, pictures and content. One entry alone: the order of several in a header is
# not defined by the library.
ORIGIN = "origin"
# Pictures a shard: a few MB of ids at most.
ROWS = 4096
LARGEST_INT16 = 2**15 - 1


@dataclass(frozen=True)
class Written:
    """The result of `write_shards`: pictures in all, shards made and shards that were there.

    Under a launcher, `made` is what this process made; the others' shards count as there.
    """

    count: int
    made: int
    kept: int


@dataclass(frozen=True)
class PicturePart:
    """The input of a shard: `pixels` (N, C, H, W) uint8 as a plain array, and the rest.

    `texts` has the columns of strings that there are, `origin` is the entry of the header.
    """

    path: Path
    origin: str
    pixels: np.ndarray
    labels: list[int] | None
    texts: dict[str, list[str]]


@dataclass(frozen=True, eq=False)
class PictureShard:
    """The pictures `first` to `stop` of all of them, and the file of their tokens."""

    number: int
    pictures: Pictures
    first: int
    stop: int
    path: Path
    origin: str

    def __str__(self) -> str:
        return self.path.name

    def is_complete(self) -> bool:
        """Whether its file is there, from these pictures and this codec."""
        return _header(self.path)[0] == self.origin

    def clear(self) -> None:
        """Remove what killed makers have left, and the file where its content was altered."""
        sweep(self.path.parent, f"{self.path.name}.")
        if self.is_complete() and not _is_unaltered(self.path):
            self.path.unlink()

    def part(self) -> PicturePart:
        """The pictures, sliced on demand: only those of active workers are held twice."""
        cut = self.pictures.at(torch.arange(self.first, self.stop))
        return PicturePart(
            path=self.path, origin=self.origin, pixels=cut.pixels.numpy(),
            labels=None if cut.labels is None else cut.labels.tolist(),
            texts={name: texts for name in TEXTS if (texts := vars(cut)[name]) is not None},
        )  # fmt: skip

    def without(self, item: Hashable, how: str) -> None:
        """None: pictures of one size cost the same, so no single one causes a crash."""


@dataclass(frozen=True)
class Encoder:
    """Makes the codec in a worker, from its options and the folder of its weights."""

    described: dict[str, object]
    folder: str

    def open(self, worker: int) -> Make:
        """Make the codec."""
        return partial(encode_shard, make_codec(self.described, folder=self.folder))


def write_shards(
    pictures: Pictures, out: Path, *, codec: Codec, rows: int = ROWS, workers: int | None = None,
    timeout: float | None = None, report: Report | None = None,
) -> Written:  # fmt: skip
    """Encode the pictures whose shards are not yet in the folder `out`.

    `rows` pictures a shard; `workers` processes (None: one a core) of one thread each, which may
    take `timeout` seconds for a shard (see `volume.make_all`). Raises ConfigError where `out`
    holds tokens of another codec or other files, CheckpointError while another process writes
    there, DataError where the codec refuses the pictures.
    """
    launched = Launched.here()
    if rows < 1 or (workers is not None and workers < 1):
        raise ConfigError(f"rows={rows}, workers={workers}: need at least 1 of each")
    usual = os.cpu_count() or 1 if launched.world == 1 else 1
    count = usual if workers is None else workers
    check_pool(count, timeout, launched)
    made_by = fingerprint(codec)
    shards = _shards(pictures, out, made_by, rows)
    count = max(1, min(count, len(shards)))
    with launched.held(out), tempfile.TemporaryDirectory() as folder:
        replaced = _begin(shards, out, made_by, launched)
        if replaced and report is not None:
            report(f"{replaced} shards of other pictures in {out} are replaced")
        if count > 1 or timeout is not None:
            save_codec(codec, folder)
        job = Job(shards, partial(encode_shard, codec), Encoder(codec.config(), folder), out)
        made = make_all(
            job, launched, workers=count, timeout=timeout, report=report or (lambda line: None)
        )
        if launched.rank == 0:
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


def _begin(shards: Sequence[PictureShard], out: Path, made_by: str, launched: Launched) -> int:
    """Check that the folder may take these shards; remove the manifest of an incomplete one.

    Returns how many shards of other pictures it holds, which are written over or removed.
    """
    known = _known(out, made_by)
    # A later rank checks its own shards alone: when it comes late, the first may have written
    # the manifest since it checked another's.
    checked = launched.share(shards) if launched.rank else shards
    surplus = set(known) - {shard.path.name for shard in shards} if launched.rank == 0 else set()
    if surplus or any(known.get(shard.path.name) != shard.origin for shard in checked):
        (out / MANIFEST).unlink(missing_ok=True)
    if launched.rank == 0:
        sweep(out, MANIFEST)
        for name in surplus:
            sweep(out, name)
            (out / name).unlink()
    wanted = {shard.path.name: shard.origin for shard in shards}
    return sum(bool(origin) and wanted.get(name) != origin for name, origin in known.items())


def _known(out: Path, made_by: str) -> dict[str, str]:
    """The origins of the shards in a folder, by name; "" of a damaged one.

    Raises ConfigError for another codec's tokens and for a folder of other things.
    """
    # Listed once: another rank may add to it. A hidden file is a lock or a desktop's own.
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
    if any(origin and not origin.startswith(f"{made_by}:") for origin in known.values()):
        raise ConfigError(f"{out} holds tokens of another codec: name a new folder")
    return known


def _header(path: Path) -> tuple[str, str]:
    """The origin in a shard's header, and its content's digest; "" where the file is not complete.

    Raises LookupError for a complete file of tensors that is no shard.
    """
    try:
        check_tensors(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length)).get("__metadata__", {})[ORIGIN]
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


def encode_shard(codec: Codec, part: PicturePart, heartbeat: Heartbeat) -> None:
    """Encode one shard and write it atomically."""
    ids = codec.encode(torch.from_numpy(part.pixels))
    small = codec.codebook_size - 1 <= LARGEST_INT16
    tensors = {"ids": ids.to(torch.int16 if small else torch.int32).contiguous()}
    if part.labels is not None:
        tensors["labels"] = torch.tensor(part.labels, dtype=torch.int64)
    for name, texts in part.texts.items():
        tensors[name], tensors[f"{name}.ends"] = packed(texts)
    origin = f"{part.origin}:{_content_digest(tensors)}"
    replace_file(part.path, [save(tensors, metadata={ORIGIN: origin})])


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
