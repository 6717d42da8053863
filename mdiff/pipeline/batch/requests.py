"""Requests, one JSON object a line, read so that a bad line is a failure of its own."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass

from mdiff.errors import CheckpointError, DataError, nearest
from mdiff.files import parse_json

KINDS = ("prompt", "infill", "chat")
KEYS = (*KINDS, "length", "id", "seed")
# No model reads a longer line, and a reader must not be brought down by one.
MOST_BYTES = 2**20
# Tokens of a canvas: far more than any window.
MOST_TOKENS = 2**20
MOST_ID = 200


@dataclass(frozen=True)
class Request:
    """One line of a file: what to generate, and the id of its result.

    `kind` is one of KINDS and `words` its text; `id` is its own or the number of its line.
    """

    line: int
    id: str | int
    kind: str
    words: str
    length: int | None = None
    own_seed: int | None = None

    @property
    def key(self) -> str:
        """The id as JSON: the text "7" and the number 7 are two ids."""
        return json.dumps(self.id)

    def seed(self, run_seed: int) -> int:
        """Its own seed, or 63 bits of SHA-256 of the run's seed and the id.

        >>> Request(1, "a", "prompt", "").seed(0) == Request(9, "a", "prompt", "").seed(0)
        True
        """
        if self.own_seed is not None:
            return (self.own_seed + 2**63) % 2**64 - 2**63
        digest = hashlib.sha256(f"{run_seed}:{self.key}".encode()).digest()
        return int.from_bytes(digest[:8]) >> 1


@dataclass(frozen=True)
class Failure:
    """A request that failed: its line, its id where that is known, and why."""

    line: int
    id: str | int | None
    error: str

    def json(self) -> str:
        """One line of a file of failures."""
        return json.dumps({"line": self.line, "id": self.id, "error": self.error}) + "\n"


def read_requests(content: bytes) -> tuple[list[Request], list[Failure]]:
    """The requests of a JSONL file's content in their order, and the invalid lines.

    Lines with the same id are all failures.
    """
    requests: list[Request] = []
    failures: list[Failure] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            requests.append(_request(line, number))
        except (CheckpointError, DataError) as error:
            failures.append(Failure(number, None, str(error)))
    often = Counter(request.key for request in requests)
    twice = [request for request in requests if often[request.key] > 1]
    failures += [
        Failure(request.line, request.id, f"the id {request.key} occurs {often[request.key]} times")
        for request in twice
    ]
    return [request for request in requests if often[request.key] == 1], failures


def _request(line: bytes, number: int) -> Request:
    """The request of one line; DataError or CheckpointError for an invalid one."""
    if len(line) > MOST_BYTES:
        raise DataError(f"the line has {len(line)} bytes: at most {MOST_BYTES} are read")
    row = parse_json(line, origin=f"line {number}")
    for key in row:
        if key not in KEYS:
            raise DataError(f"unknown key {key[:80]!r}; {nearest(key[:80], KEYS)}")
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1 or not isinstance(row[kinds[0]], str):
        raise DataError("expected one of 'prompt', 'infill' and 'chat', a string")
    length = row.get("length")
    if length is not None and (not _is_integer(length, 1, MOST_TOKENS) or kinds[0] == "infill"):
        raise DataError(
            f"length={str(length)[:80]}: expected 1 to {MOST_TOKENS}, for a prompt or chat"
        )
    seed = row.get("seed")
    if seed is not None and not _is_integer(seed, -(2**63), 2**64 - 1):
        raise DataError(f"seed={str(seed)[:80]}: expected a whole number of 64 bits")
    return Request(number, _id(row.get("id", number)), kinds[0], row[kinds[0]], length, seed)


def _is_integer(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _id(value: object) -> str | int:
    """The id; DataError where it is neither a short text nor a whole number."""
    if type(value) is int and abs(value) < 2**63:
        return value
    # Half a character, as "\\ud800" is, cannot be written.
    halves = isinstance(value, str) and any("\ud800" <= each <= "\udfff" for each in value)
    if halves or not isinstance(value, str) or not 1 <= len(value) <= MOST_ID:
        raise DataError(
            f"id={str(value)[:80]!r}: expected a whole number or text of 1 to {MOST_ID} characters"
        )
    return value
