"""Hostile files made from valid ones: every mutation is a function of a random.Random alone."""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONG = 200_000
DEEP = 100_000
# Values that a reader of numbers, names or lists may not have thought of.
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, -(10**9), 1e308, -1e308, 0.5,
    float("nan"), float("inf"), "", "x", "\0", "../../etc/passwd", "/etc/passwd", "..", ".",
    "os:system", "é\ud800", "a" * 1000, [], {}, [[]], [{}], {"": {}}, [1, 2, 3], [-1], [0, 0],
    ["a", "b"], [None], {"a": 1}, {"name": "x"}, 10**5, 10**7, 10**9, 1e-300,
)  # fmt: skip
PIECES = (
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u0000",
    b"NaN", b"-", b"1e999", b"9" * 5000, b"[" * DEEP, b'{"a":' * DEEP, b"a" * LONG, b"\n", b"\r",
    b"\t", b"*a", b"&a ", b"<<: ", b"!!python/object/apply:os.system ", b"!!binary x", b"!!set ",
    b"- ", b": ", b"? ", b"| ", b"%", b"---\n", b"...\n", b"#",
)  # fmt: skip
LINK_TARGETS = ("/etc/passwd", "/dev/zero", "..", ".", "/", "/dev/null", "itself")


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """The bytes with one thing wrong: flipped, cut, repeated, moved, or with a piece put in."""
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + 2 ** chance.randrange(10))
    kind = chance.randrange(8)
    if kind == 0 and data:
        at = chance.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[end:]
    if kind == 3:
        return data[:start] + data[start:end] * chance.choice((2, 3, 100)) + data[end:]
    if kind == 4:
        return data[:start] + chance.randbytes(end - start) + data[end:]
    if kind == 5:
        return data[:start] + bytes(end - start) + data[end:]
    if kind == 6:
        return chance.choice((b"", data[start:], data[::-1], data * 2))
    return data[:start] + chance.choice(PIECES) + data[start:]


def mutated_json(data: bytes, chance: random.Random) -> bytes:
    """A JSON object with one value, key or level changed; now and then its bytes."""
    if chance.random() < 0.2:
        return mutated_bytes(data, chance)
    try:
        return _with_one_change(json.loads(data), chance)
    except (ValueError, RecursionError):
        # It was mutated before, or is nested too deep to be written again.
        return mutated_bytes(data, chance)


def _with_one_change(value: Any, chance: random.Random) -> bytes:
    """The value as JSON with one value, key or level changed; ValueError where there is none."""
    spots = list(_spots(value)) if isinstance(value, dict | list) else []
    if not spots:
        raise ValueError
    holder, key = chance.choice(spots)
    kind = chance.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == 2:
        # The same key twice, which json.dumps cannot write.
        holder[key] = "MARK"
        twice = f'"MARK", {json.dumps(str(key))}: 1' if isinstance(holder, dict) else '"MARK", 1'
        return json.dumps(value).replace('"MARK"', twice).encode()
    elif kind == 3:
        depth = chance.choice((10, 70, 900, DEEP))
        holder[key] = "MARK"
        return json.dumps(value).replace('"MARK"', "[" * depth + "]" * depth).encode()
    elif kind == 4:
        holder[key] = chance.choice(("a", "../", "é", "\n")) * LONG
    elif kind == 5 and isinstance(holder[key], int | float):
        change = chance.choice((-1, 1, 10, 1000, 10**6))
        holder[key] = chance.choice((holder[key] + change, holder[key] * change, -holder[key]))
    elif kind == 6:
        other, there = chance.choice(spots)
        holder[key] = copy.deepcopy(other[there])
    else:
        holder[key] = chance.choice(HOSTILE)
    return json.dumps(value).encode()


def mutated_tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header, an absurd length of it, or other bytes."""
    kind = chance.randrange(4)
    length = int.from_bytes(data[:8], "little")
    if kind == 0:
        near = (length - 1, min(length + 1, 2**64 - 1))
        absurd = chance.choice((0, 1, 7, *near, 2**20, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", max(absurd, 0)) + data[8:]
    if kind == 1:
        return mutated_bytes(data, chance)
    header = mutated_json(data[8 : 8 + length], chance)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def mutated_lines(data: bytes, chance: random.Random) -> bytes:
    """JSON lines with one of them mutated as JSON or as bytes."""
    lines = data.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = chance.choice((mutated_json, mutated_bytes))(lines[at], chance)
    return b"\n".join(lines)


def mutated_spot(path: Path, chance: random.Random) -> None:
    """What lies at `path` becomes a link, a directory, a pipe, or is gone."""
    kind = chance.randrange(6)
    data = path.read_bytes()
    path.unlink()
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        target = chance.choice(LINK_TARGETS)
        path.symlink_to(path.name if target == "itself" else target)
    elif kind == 3:
        # The right content, but outside.
        outside = path.parent.parent / f"outside {path.name}"
        outside.write_bytes(data)
        path.symlink_to(outside)
    elif kind == 4:
        path.write_bytes(data)
        path.rename(path.with_name(chance.choice(("x", f"{path.name}.bin", "pytorch_model.bin"))))


def mutation_of(path: Path) -> Callable[[bytes, random.Random], bytes]:
    """The mutation that knows a file of this name."""
    if path.suffix == ".json":
        return mutated_json
    if path.suffix == ".safetensors":
        return mutated_tensors
    return mutated_lines if path.suffix == ".jsonl" else mutated_bytes


def mutate(path: Path, chance: random.Random, *, replaced: bool = True) -> None:
    """Change one file where it lies; other names of the same file keep what they have.

    `replaced`: whether it may also become something other than a file.
    """
    if replaced and chance.random() < 0.05:
        mutated_spot(path, chance)
        return
    data = path.read_bytes()
    change = mutation_of(path)
    changed = change(data, chance) if data else chance.choice(PIECES)
    path.unlink()
    path.write_bytes(changed)


def _spots(value: Any) -> Any:
    """Every (holder, key) of a nested value."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        yield value, key
        if isinstance(child, dict | list):
            yield from _spots(child)
