"""The plan of batch generation: its batches and shards, and what a later run has to agree with.

A plan is a function of the file of requests, the model and the options alone: every process makes
the same, and a run that is started again finds its own.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch

from mdiff.errors import CheckpointError, ConfigError, DataError, MdiffError
from mdiff.files import MANIFEST, complete, staged, verify, write_json
from mdiff.modalities.text import HOLE
from mdiff.pipeline.batch.requests import MOST_TOKENS, Failure, Request, read_requests
from mdiff.pipeline.generation import Generation
from mdiff.pipeline.options import CallOptions
from mdiff.pipeline.pipeline import Pipeline

PLAN, PLAN_FILE, LINES_FILE = "plan", "plan.json", "lines.sha256"
FORMAT = 1
# The keys of options in the file of the plan that have another name now.
RECORDED = {"negative_prompt": "negative"}
# About so many shards, for workers to share, of at most so many batches, for a kill to cost.
SHARDS_WANTED = 64
MOST_BATCHES = 32
# Bytes of a line's digest: enough to find the first line that differs.
LINE_BYTES = 8
# Errors that a request can cause; that of a disk, a memory or a device is not among them.
REQUEST_ERRORS = (MdiffError, ValueError, TypeError, LookupError, ArithmeticError)

# Requests that go through the model together.
Batch = tuple[Request, ...]


@dataclass(frozen=True)
class Setting:
    """The arguments that every shard of a run is made with.

    `options` are those of `Pipeline.runs` but for seed, batch_size and echo; `length`, or else
    `max_new_tokens`, is for requests without a length of their own; `num_samples` samples are
    made of each request, `batch_size` at a time.
    """

    seed: int = 0
    num_samples: int = 1
    length: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    options: CallOptions = field(default_factory=CallOptions)

    def record(self) -> dict[str, object]:
        """What a later run has to agree with, under the names of the file of the plan."""
        # Names that were in use when the first of these files were written stay.
        options = {RECORDED.get(name, name): value for name, value in self.options.items()}
        more = {} if self.max_new_tokens is None else {"max_new_tokens": self.max_new_tokens}
        return {
            "seed": self.seed, "n": self.num_samples, "length": self.length,
            "batch_size": self.batch_size, "options": options, **more,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be made: `record` is what a later run must agree with; a shard is batches."""

    record: dict[str, object]
    lines: bytes
    requests: list[Request]
    failures: list[Failure]
    shards: list[tuple[Batch, ...]]


def planned(
    pipeline: Pipeline, content: bytes, setting: Setting, *, model: str,
    fixed: Mapping[str, object],
) -> Plan:  # fmt: skip
    """The plan of a JSONL file's `content`, the same whoever makes it.

    `model` is the digest of the weights; `fixed` what else has to be the same in a later run, such
    as the device. Requests are sorted by the length of their canvas and by their id, so that a
    file in another order is made in the same batches. Raises ConfigError for options that the
    sampler does not take, DataError for a file without a request.
    """
    for name, value in (("num_samples", setting.num_samples), ("batch_size", setting.batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value}: need at least 1")
    requests, failures = read_requests(content)
    if not requests and not failures:
        raise DataError("the file of requests holds no object")
    sizes, unfit = _sizes(pipeline, requests, setting)
    failures = sorted(failures + unfit, key=lambda failure: failure.line)
    good = [request for request in requests if request.line in sizes]
    if not good:
        first = failures[0]
        raise DataError(
            f"none of {len(failures)} requests can be met; line {first.line}: {first.error}"
        )
    shards = _shards(good, sizes, setting, window=pipeline.window)
    lines = content.split(b"\n")
    record = {
        "format": FORMAT,
        "requests": {"count": len(good), "sha256": hashlib.sha256(content).hexdigest()},
        "model": model,
        **setting.record(),
        **fixed,
    }
    digests = b"".join(hashlib.sha256(line).digest()[:LINE_BYTES] for line in lines)
    # As it is read back: a tuple is a list then.
    return Plan(json.loads(json.dumps(record, default=str)), digests, good, failures, shards)


def _sizes(
    pipeline: Pipeline, requests: Sequence[Request], setting: Setting
) -> tuple[dict[int, int], list[Failure]]:
    """The length of each request's canvas by its line, and the requests that do not fit."""
    sizes: dict[int, int] = {}
    failures = []
    refused: dict[int, str] = {}
    probed = False
    for request in requests:
        try:
            canvas = canvas_of(pipeline, request, setting)
        except REQUEST_ERRORS as error:
            failures.append(failure_of(request, error))
            continue
        size = len(canvas)
        if size not in refused:
            refused[size] = _refusal(pipeline, size, setting)
        if refused[size]:
            failures.append(Failure(request.line, request.id, refused[size]))
            continue
        if not probed:
            _probe(pipeline, canvas, setting)
            probed = True
        sizes[request.line] = size
    return sizes, failures


def _refusal(pipeline: Pipeline, size: int, setting: Setting) -> str:
    """Why no canvas of this size can be generated, or "".

    Raises ConfigError where that is not due to the size.
    """
    try:
        runs_of(pipeline, [[pipeline.space.mask_id] * size], [0], setting)
    except ConfigError as error:
        if pipeline.window is None or size <= pipeline.window:
            raise
        return str(error)
    return ""


def _probe(pipeline: Pipeline, canvas: list[int], setting: Setting) -> None:
    """Take one step: an invalid option is refused before there is a plan."""
    try:
        for run in runs_of(pipeline, [canvas], [0], setting):
            with torch.no_grad():
                next(iter(run), None)
    except ConfigError:
        raise
    except REQUEST_ERRORS:
        # An error of this request alone: it fails in its turn.
        return


def _shards(
    requests: Sequence[Request], sizes: dict[int, int], setting: Setting, *, window: int | None
) -> list[tuple[Batch, ...]]:
    """Requests in batches of like length, batches in shards."""

    def group(request: Request) -> tuple[bool, bool]:
        # Whether the output begins with the prompt, and whether the sampler moves a window along.
        return request.kind == "chat", window is not None and sizes[request.line] > window

    ordered = sorted(requests, key=lambda r: (group(r), sizes[r.line], r.key))
    most = max(1, setting.batch_size // setting.num_samples)
    batches: list[Batch] = []
    for _, members in groupby(ordered, key=group):
        alike = list(members)
        batches += [tuple(alike[first : first + most]) for first in range(0, len(alike), most)]
    each = min(MOST_BATCHES, max(1, len(batches) // SHARDS_WANTED))
    return [tuple(batches[first : first + each]) for first in range(0, len(batches), each)]


def canvas_of(pipeline: Pipeline, request: Request, setting: Setting) -> list[int]:
    """The canvas of a request; DataError or ConfigError for an invalid one."""
    if request.kind == "infill":
        holes = sum(
            min(int(hole[1] or 1), MOST_TOKENS + 1) for hole in HOLE.finditer(request.words)
        )
        if holes > MOST_TOKENS:
            raise DataError(f"the gaps hold more than {MOST_TOKENS} tokens")
        return pipeline.templates(request.words)[0]
    prompt = {"chat": request.words} if request.kind == "chat" else request.words
    length = request.length or setting.length
    new = None if request.length else setting.max_new_tokens
    return pipeline.canvases(prompt, length=length, max_new_tokens=new)[0]


def runs_of(
    pipeline: Pipeline, canvases: list[list[int]], seeds: list[int], setting: Setting,
    *, echo: bool = True,
) -> Iterator[Generation]:  # fmt: skip
    """The batches of canvases with a seed each; ConfigError as `Pipeline.runs` raises it."""
    options: CallOptions = {
        **setting.options, "seed": torch.tensor(seeds), "batch_size": setting.batch_size,
        "echo": echo,
    }  # fmt: skip
    return pipeline.runs(canvases, **options)


def failure_of(request: Request, error: BaseException) -> Failure:
    """The failure of a request by an error."""
    return Failure(request.line, request.id, error_line(error))


def error_line(error: BaseException) -> str:
    """The error in one line, with its type where that is not one of ours."""
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, MdiffError) else f"{type(error).__name__}: {text}"


def agree(record: Mapping[str, object], out: Path, *, lines: bytes | None = None) -> None:
    """Check that the folder `out` has the plan `record`; one without a plan gets it.

    `lines` are the digests of a file of requests. Raises ConfigError, with the difference, where
    it has another or holds other things.
    """
    folder = out / PLAN
    others = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if not folder.exists():
        if others:
            raise ConfigError(f"{out} holds {min(others)} and no plan: name a new folder")
        try:
            with staged(folder) as new:
                write_json(new / PLAN_FILE, record)
                if lines is not None:
                    (new / LINES_FILE).write_bytes(lines)
            return
        except (CheckpointError, OSError):
            # The process of another share may have written its plan meanwhile.
            if not complete(folder):
                raise
    verify(folder)
    known = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    if known == record:
        return
    changed = [
        f"{name} was {json.dumps(was)}, now {json.dumps(now)}"
        for name, was, now in _differences(known, record)
        if not name.startswith("requests.")
    ]
    if lines is not None and known.get("requests") != record["requests"]:
        known_lines = folder / LINES_FILE
        was_lines = known_lines.read_bytes() if known_lines.exists() else b""
        changed.insert(0, _other_line(was_lines, lines))
    raise ConfigError(
        f"{out} was begun with another plan: {'; '.join(changed)}; give the same, or another --out"
    )


def _differences(was: object, now: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Each value that differs, by its dotted name; what is missing counts as null."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif was != now:
        yield name, was, now


def _other_line(was: bytes, now: bytes) -> str:
    """Which line of the file of requests is the first that differs."""
    starts = range(0, max(len(was), len(now)), LINE_BYTES)
    first = next((s for s in starts if was[s : s + LINE_BYTES] != now[s : s + LINE_BYTES]), 0)
    return (
        f"the requests differ from line {first // LINE_BYTES + 1} on "
        f"({len(was) // LINE_BYTES} lines then, {len(now) // LINE_BYTES} now)"
    )


def model_digest(folder: Path) -> str:
    """SHA-256 of a model's directory: of its manifest, or of its files themselves."""
    if (folder / MANIFEST).exists():
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.relative_to(folder).as_posix()}:{digest}\n".encode())
    return total.hexdigest()
