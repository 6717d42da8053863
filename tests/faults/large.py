"""A child process that loads files of absurd size: `python large.py PROGRESS WORK [KIND...]`.

In turn, every file of every kind (or of those named) gets a string of 100 MB where it takes one;
without kinds there are also the BOMBS: small files, or files within the limits, that could become
large or slow. A JSON line each goes to PROGRESS.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

import corpus  # noqa: E402
import numpy as np  # noqa: E402
from batch import valid  # noqa: E402
from measured import limit_memory, measured  # noqa: E402

from mdiff.files.untrusted import MAX_JSON_BYTES, read_json, read_tensors  # noqa: E402
from mdiff.modalities.image.data.images import read_pictures  # noqa: E402
from mdiff.modalities.text.documents import Source  # noqa: E402
from mdiff.pipeline.batch.requests import read_requests  # noqa: E402
from mdiff.training.recipe import load_recipe  # noqa: E402

STRING = b"a" * 10**8


def stretched(path: Path) -> bytes:
    """The file's content with the string in it, where its format can hold one."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].rstrip()[:-1] + b',"__metadata__":{"x":"' + STRING + b'"}}'
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    if path.suffix == ".json":
        return data.rstrip()[:-1] + b',"x":"' + STRING + b'"}'
    if path.suffix == ".jsonl":
        return data + b'{"text":"' + STRING + b'"}\n'
    if path.suffix == ".yaml":
        return data + b"x: " + STRING + b"\n"
    return data + STRING


def stretched_files(kinds: list[str], seeds: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Each file of each kind in its turn."""
    for kind in kinds:
        source = valid(kind, seeds)
        for path in sorted(p for p in source.rglob("*") if p.is_file()):
            folder = work / kind
            shutil.copytree(source, folder, copy_function=os.link)
            target = folder / path.relative_to(source)
            content = stretched(path)
            target.unlink()
            target.write_bytes(content)
            del content
            found = measured(partial(corpus.CASES[kind][1], folder))
            shutil.rmtree(work)
            yield {"kind": kind, "file": path.name, **found}


def filled_json(start: bytes, piece: bytes, end: bytes, *, size: int = MAX_JSON_BYTES) -> bytes:
    """As many pieces as `size` bytes hold; `%d` in a piece counts."""
    room = size - len(start) - len(end)
    if b"%d" not in piece:
        return start + (piece * (room // len(piece) + 1))[:room].rsplit(b",", 1)[0] + end
    body = b"".join(piece % number for number in range(room // (len(piece) + 6)))
    return start + body.removesuffix(b",") + end


def png(width: int, height: int, *, palette: bool) -> bytes:
    """A picture of one colour: its file is a thousandth of its pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    kind, each = (3, 1) if palette else (6, 4)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    table = chunk(b"PLTE", b"\0\0\0") + chunk(b"tRNS", b"\0") if palette else b""
    packer, packed = zlib.compressobj(1), bytearray()
    row = bytes(1 + each * width)
    for _ in range(height):
        packed += packer.compress(row)
    return (
        b"\x89PNG\r\n\x1a\n" + head + table + chunk(b"IDAT", bytes(packed + packer.flush()))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def zeros(file: Any, start: bytes) -> None:
    """Write a start and a gigabyte of zeros."""
    file.write(start)
    for _ in range(2**10):
        file.write(bytes(2**20))


def packed_arrays() -> bytes:
    """An archive of black pictures."""
    head, file = io.BytesIO(), io.BytesIO()
    described = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 32, 32)}
    np.lib.format.write_array_header_1_0(head, described)
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w") as entry,
    ):
        zeros(entry, head.getvalue())
    return file.getvalue()


def packed(start: bytes) -> bytes:
    """A gzip file of a start and zeros."""
    inner = io.BytesIO()
    with gzip.GzipFile(fileobj=inner, mode="wb", mtime=0) as file:
        zeros(file, start)
    return inner.getvalue()


def tensor_file(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


def in_file(name: str, content: Callable[[], bytes], load: Callable[[Path], Any]) -> Any:
    """A bomb: the name of its file, what is in it, and who reads it."""
    return name, content, load


EMPTY = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
BOMBS = [
    in_file("lists.json", lambda: filled_json(b'{"a":[', b"[],", b"]}"), read_json),
    in_file("keys.json", lambda: filled_json(b"{", b'"%d":1,', b"}"), read_json),
    in_file("numbers.json", lambda: filled_json(b'{"a":[', b"999,", b"]}"), read_json),
    in_file("fewer_keys.json", lambda: filled_json(b"{", b'"%d":1,', b"}", size=2**23), read_json),
    in_file("wide.json", lambda: '{"a":"é\U0001f600'.encode() + b"a" * (2**25 - 20) + b'"}',
            read_json),
    in_file("escapes.json", lambda: b'{"a":"' + b"\\u0000" * 5 * 10**6 + b'"}', read_json),
    in_file("x.safetensors", lambda: tensor_file(filled_json(b"{", EMPTY, b"}")), read_tensors),
    in_file("some.safetensors", lambda: tensor_file(filled_json(b"{", EMPTY, b"}", size=2**22)),
            read_tensors),
    in_file("list.yaml", lambda: b"data: [" + b"a," * 32_000 + b"]", load_recipe),
    in_file("keys.yaml", lambda: b"".join(b"k%d: 1\n" % i for i in range(6_500)), load_recipe),
    in_file("lines.yaml", lambda: b"data:\n" + b"- a\n" * 16_000, load_recipe),
    in_file("scalar.yaml", lambda: b"data: " + b"a " * 32_000, load_recipe),
    in_file("tensors.safetensors",
            lambda: tensor_file(filled_json(b"{", EMPTY, b"}", size=1_800_000)), read_tensors),
    in_file("row.jsonl", lambda: filled_json(b'{"text":"a","x":[', b"[],", b"]}", size=2**23),
            lambda path: Source.of(str(path)).documents()),
    in_file("requests.jsonl", lambda: STRING, lambda path: read_requests(path.read_bytes())),
    in_file("zeros.txt.gz", lambda: packed(b"text"),
            lambda path: Source.of(str(path)).documents()),
    in_file("t-images-idx3-ubyte.gz",
            lambda: packed(bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**20, 32, 32)),
            lambda path: read_pictures(str(path), channels=1)),
    in_file("zeros.npz", packed_arrays, lambda p: read_pictures(str(p), channels=1)),
    in_file("palette.png", lambda: png(7094, 7094, palette=True),
            lambda path: read_pictures(str(path), channels=3)),
    in_file("colours.png", lambda: png(7094, 7094, palette=False),
            lambda path: read_pictures(str(path), channels=3)),
    in_file("larger.png", lambda: png(40000, 40000, palette=True),
            lambda path: read_pictures(str(path), channels=3)),
]  # fmt: skip


def bombs(work: Path) -> Iterator[dict[str, Any]]:
    """Each bomb in its turn."""
    for name, content, load in BOMBS:
        work.mkdir(parents=True)
        (work / name).write_bytes(content())
        yield {"kind": "bomb", "file": name, **measured(partial(load, work / name))}
        shutil.rmtree(work)


def main(progress: Path, work: Path, kinds: list[str]) -> None:
    """All that was asked for."""
    warnings.simplefilter("ignore")
    limit_memory()
    with progress.open("w") as file:
        for row in stretched_files(kinds or list(corpus.CASES), work / "valid", work / "trial"):
            print(json.dumps(row), file=file, flush=True)
        for row in [] if kinds else bombs(work / "bomb"):
            print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
