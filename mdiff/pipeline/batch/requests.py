"""Requests, one JSON object a line, read so that a bad line is a failure of its own."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import BaseModel, Field

from mdiff.errors import CheckpointError, DataError
from mdiff.files import STRICT, parse_json, parse_settings

KINDS = ("prompt", "infill", "chat")
# No model reads a longer line, and a reader must not be brought down by one.
MOST_BYTES = 2**20
# Tokens of a canvas: far more than any window.
MOST_TOKENS = 2**20
MOST_ID = 200
ONE = "one of 'prompt', 'infill' and 'chat', a string"
Words = Annotated[str, Field(description=ONE)]


class Line(BaseModel):
    """What a line may hold: exactly one of KINDS; only `length` and `seed` may be null."""

    model_config = STRICT
    prompt: Words = ""
    infill: Words = ""
    chat: Words = ""
    length: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = Field(
        None, description=f"1 to {MOST_TOKENS}, for a prompt or chat"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(
        None, description="a whole number of 64 bits"
    )
    id: (
        Annotated[int, Field(gt=-(2**63), lt=2**63)]
        | Annotated[str, Field(min_length=1, max_length=MOST_ID)]
    ) = Field(description=f"a whole number or text of 1 to {MOST_ID} characters")


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
        return json.dumps(asdict(self)) + "\n"


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
    found = parse_settings(Line, {"id": number, **row}, error=DataError)
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1:
        raise DataError(f"expected {ONE}")
    if found.length is not None and kinds[0] == "infill":
        raise DataError(f"length={found.length}: is for a prompt or chat")
    return Request(number, found.id, kinds[0], row[kinds[0]], found.length, found.seed)
