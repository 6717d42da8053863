"""Writing tokenised pictures: in parallel, whole files only, and only what is missing.

A shard says in its header which pictures and which codec made it: a second run over the same
pictures finds it and leaves it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from mdiff.codec import Codec, Report, make_codec, save_codec
from mdiff.errors import CheckpointError, ConfigError
from mdiff.files import check_tensors
from mdiff.pictures import Pictures
from mdiff.shards import FORMAT, MANIFEST, TEXTS, file_digest, fingerprint, packed

SHARD = "shard-{:06d}.safetensors"
# One entry alone: the order of several in a header is the library's whim.
ORIGIN = "origin"
# Pictures a shard: a few MB of ids at most.
ROWS = 4096
LARGEST_INT16 = 2**15 - 1

# A shard's pictures, where it goes, and what its header says of its origin.
Job = tuple[Pictures, Path, str]
# The codec of a worker process, made once when it starts.
_own: dict[str, Any] = {}


@dataclass(frozen=True)
class Written:
    """What `write_shards` did: pictures in all, shards made and shards found made already."""

    count: int
    made: int
    kept: int


def write_shards(
    pictures: Pictures, out: Path, *, codec: Codec, rows: int = ROWS, workers: int | None = None,
    report: Report | None = None,
) -> Written:  # fmt: skip
    """Encode pictures into the folder `out`, whatever part of it is not there yet.

    `rows` pictures a shard; `workers` processes (None: one a core) of one thread each. Raises
    ConfigError where `out` holds tokens of another codec or other files, DataError where the
    codec refuses the pictures.
    """
    if rows < 1 or (workers is not None and workers < 1):
        raise ConfigError(f"rows={rows}, workers={workers}: need at least 1 of each")
    made_by = fingerprint(codec)
    known = _known(out, made_by)
    parts = [
        pictures.at(torch.arange(first, min(first + rows, len(pictures))))
        for first in range(0, len(pictures), rows)
    ]
    names = [SHARD.format(number) for number in range(len(parts))]
    origins = [f"{made_by}:{_digest_of(part)}" for part in parts]
    jobs = [
        (part, out / name, origin)
        for part, name, origin in zip(parts, names, origins)
        if known.get(name) != origin
    ]
    surplus = set(known) - set(names)
    if jobs or surplus:
        # From here to the end the folder is not whole.
        (out / MANIFEST).unlink(missing_ok=True)
    for name in surplus:
        (out / name).unlink()
    for done, path in enumerate(_finished(codec, jobs, workers), start=1):
        if report is not None:
            report(f"{path.name}: {done} of {len(jobs)}")
    _write(out / MANIFEST, _manifest(codec, made_by, pictures, parts, out, names))
    return Written(len(pictures), len(jobs), len(parts) - len(jobs))


def _known(out: Path, made_by: str) -> dict[str, str]:
    """The origins of the shards in a folder, by name; "" of a damaged one.

    Makes the folder. Raises ConfigError for another codec's tokens and for a folder of other
    things.
    """
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.part"):
        leftover.unlink()
    found = sorted(out.glob(SHARD.replace("{:06d}", "*")))
    # A hidden file is a lock or a desktop's own.
    others = {path for path in out.iterdir() if not path.name.startswith(".")} - {*found}
    if others - {out / MANIFEST} or (others and not found):
        raise ConfigError(f"{out} holds {min(others).name}: name a new folder")
    known = {}
    for path in found:
        known[path.name] = origin = _origin_of(path)
        if origin and not origin.startswith(f"{made_by}:"):
            raise ConfigError(f"{out} holds tokens of another codec: name a new folder")
    return known


def _origin_of(path: Path) -> str:
    """The digests of codec and pictures in a shard's header; "" where the file is not whole."""
    try:
        check_tensors(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return str(json.loads(file.read(length))["__metadata__"][ORIGIN])
    except (CheckpointError, KeyError):
        return ""


def _digest_of(part: Pictures) -> str:
    """SHA-256 of what a shard is made from."""
    total = hashlib.sha256(str(tuple(part.pixels.shape)).encode())
    total.update(part.pixels.contiguous().numpy().tobytes())
    labels = None if part.labels is None else part.labels.tolist()
    rest = [part.names, labels, part.captions, part.groups]
    total.update(json.dumps(rest).encode())
    return total.hexdigest()


def _finished(codec: Codec, jobs: list[Job], workers: int | None) -> Iterator[Path]:
    """Each job's path when it is done; in this process where one is enough."""
    count = min(workers or os.cpu_count() or 1, len(jobs))
    if count <= 1:
        for job in jobs:
            yield encode_shard(codec, job)
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        save_codec(codec, folder)
        with ProcessPoolExecutor(
            count, mp_context=context, initializer=_start_worker, initargs=(codec.config(), folder)
        ) as pool:
            futures: list[Future[Path]] = [pool.submit(_encode_here, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(cancel_futures=True)


def _start_worker(described: dict[str, Any], folder: str) -> None:
    """Make the codec, with one thread; an interrupt is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _own["codec"] = make_codec(described, folder=folder)


def _encode_here(job: Job) -> Path:
    return encode_shard(_own["codec"], job)


def encode_shard(codec: Codec, job: Job) -> Path:
    """Encode one shard and put it in its place, whole; its path."""
    part, path, origin = job
    ids = codec.encode(part.pixels)
    small = codec.codebook_size - 1 <= LARGEST_INT16
    tensors = {"ids": ids.to(torch.int16 if small else torch.int32).contiguous()}
    if part.labels is not None:
        tensors["labels"] = part.labels
    for name in TEXTS:
        texts = getattr(part, name)
        if texts is not None:
            tensors[name], tensors[f"{name}.ends"] = packed(texts)
    _write(path, save(tensors, metadata={ORIGIN: origin}))
    return path


def _write(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk and rename it."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _manifest(
    codec: Codec, made_by: str, pictures: Pictures, parts: list[Pictures], out: Path,
    names: list[str],
) -> bytes:  # fmt: skip
    shards = [
        {"name": name, "rows": len(part), **file_digest(out / name)}
        for name, part in zip(names, parts)
    ]
    content = {
        "format": FORMAT,
        "codec": {"fingerprint": made_by, "config": codec.config()},
        "codebook_size": codec.codebook_size,
        "splits": codec.splits,
        "size": list(pictures.pixels.shape[2:]),
        "count": len(pictures),
        "label_names": pictures.label_names,
        "problems": pictures.problems,
        "shards": shards,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
