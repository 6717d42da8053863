"""Text for `mdiff generate`: requests by flags or a file, printed, or a batch over several runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mdiff.cli.options import input_rows
from mdiff.cli.views.console import message, result, result_json
from mdiff.cli.views.samples import entries, figures
from mdiff.errors import DataError

if TYPE_CHECKING:
    from mdiff.pipeline import CallOptions, Generated, Generation, Pipeline

KINDS = ("prompt", "infill", "chat")
# What a line with a chat may hold beside it.
BESIDE = ("tools", "documents", "drop_oldest")


class TextRequest(NamedTuple):
    """A text of one of KINDS, of a chat {"chat": ...}, and its own length where it has one."""

    kind: str
    text: str | dict[str, object]
    length: int | None = None


def text_requests(
    prompts: list[str] | None, infills: list[str] | None, chats: list[str] | None
) -> list[TextRequest]:
    """The requests of flags; an empty prompt where none is given."""
    if infills is not None:
        return [TextRequest("infill", text) for text in infills]
    if chats is not None:
        return [TextRequest("chat", {"chat": text}) for text in chats]
    return [TextRequest("prompt", text) for text in prompts or [""]]


def requests_of_file(path: Path) -> list[TextRequest]:
    """The requests of a JSONL file; DataError for a line that is not one."""
    found = []
    for where, row in input_rows(path, (*KINDS, *BESIDE, "length")):
        kinds = [kind for kind in KINDS if kind in row]
        text, length = row.get(kinds[0]) if len(kinds) == 1 else None, row.get("length")
        beside = {name: row[name] for name in BESIDE if name in row}
        if kinds == ["chat"] and isinstance(text, str | list):
            text = {"chat": text, **beside}
        elif not isinstance(text, str) or beside:
            raise DataError(f"{where}: expected one of 'prompt', 'infill' and 'chat', a string")
        if length is None:
            found.append(TextRequest(kinds[0], text))
        elif type(length) is int and length >= 1 and kinds[0] != "infill":
            found.append(TextRequest(kinds[0], text, length))
        else:
            raise DataError(f"{where}: length={length!r}: expected a whole number, for a prompt")
    return found


def generate_text(
    pipeline: Pipeline, requests: Sequence[TextRequest], *, num_samples: int, length: int | None,
    max_new_tokens: int | None, live: bool, trace: Path | None, title: str, as_json: bool,
    options: CallOptions,
) -> None:  # fmt: skip
    """Generate and print `num_samples` samples of each request, with a trace where asked for."""
    # Of a chat the answer alone is shown, which ends where the model ends it.
    chats = all(request.kind == "chat" for request in requests)
    options["echo"] = not chats
    free = length is None and max_new_tokens is None and not any(each.length for each in requests)
    if chats and free and pipeline.grows and options.get("end", "cut") == "cut":
        options.setdefault("grow", "blocks")
    canvases = []
    for kind, text, own in requests:
        if kind == "infill" and isinstance(text, str):
            canvases += pipeline.templates(text, num_samples=num_samples)
            continue
        canvases += pipeline.canvases(
            text, num_samples=num_samples, length=own or length,
            max_new_tokens=None if own else max_new_tokens, grow=bool(options.get("grow")),
        )  # fmt: skip
    samples = filled(pipeline.runs(canvases, **options), live=live, trace=trace, title=title)
    for number, sample in enumerate(samples):
        if as_json:
            result_json({"text": sample.output, **entries(sample)})
            continue
        if number:
            result("---")
        result(str(sample))
        message(figures(sample))


def filled(
    runs: Iterable[Generation], *, live: bool, trace: Path | None, title: str
) -> list[Generated]:
    """The samples of runs of text, shown live and recorded where asked for."""
    from mdiff.cli.views.live import watched
    from mdiff.cli.views.trace import Record, Recorder, page

    samples: list[Generated] = []
    records: list[Record] = []
    for run in runs:
        recorder = Recorder(run)
        for state in watched(run) if live else run:
            if trace is not None:
                recorder.add(state)
        samples += (done := run.finished())
        if trace is not None:
            records += recorder.records([figures(sample) for sample in done])
    if trace is not None:
        trace.write_text(page(records, title=title), encoding="utf-8")
        message(f"wrote {trace}")
    return samples


def generate_at_volume(
    pipeline: Pipeline, requests: Path, out: Path, *, as_json: bool, **options: Any
) -> None:
    """Generate what is missing in the folder; print the path of the results.

    `options` are those of `generate_offline`. Raises DataError at the end where a request failed.
    """
    from mdiff.pipeline.batch import generate_offline

    start = time.monotonic()
    outcome = generate_offline(pipeline, requests, out, report=message, **options)
    if outcome is None:
        return
    failed = outcome.failures
    if as_json:
        result_json({
            "file": str(outcome.results), "samples": outcome.samples, "failed": len(failed),
        })  # fmt: skip
    else:
        result(str(outcome.results))
    message(f"{time.monotonic() - start:.1f} s in this run")
    if failed:
        first = failed[0]
        raise DataError(
            f"{len(failed)} requests failed, see {outcome.results.with_name('failures.jsonl')}; "
            f"line {first.line}: {first.error}"
        )
